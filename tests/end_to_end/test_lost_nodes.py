"""A job goes on by itself when it loses a rank, an agent or a node: exactly, and not for ever."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from agents import Agents
from slurm_runs import ALL_STEPS, assert_exact, attempts, locally, losses, wait_for_step, write_config

from qwenlora.run.folder import RunFolder
from qwenlora.run.history import goodput
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Attempt

STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a function that gives the folder of an undisturbed run of so many ranks, with all its
    checkpoints."""
    folders = {}

    def undisturbed(ranks, *, evaluates=False):
        if (ranks, evaluates) not in folders:
            folders[ranks, evaluates] = folder = tmp_path_factory.mktemp("undisturbed")
            locally(folder, write_config(folder, STEPS, evaluates=evaluates), "run", ranks, *ALL_STEPS)
        return folders[ranks, evaluates]

    return undisturbed


@pytest.mark.parametrize(
    ("nodes", "spares", "lost"),
    [
        (3, 1, [0]),
        pytest.param(3, 0, [1], marks=pytest.mark.long),
        pytest.param(4, 0, [0, 1], marks=pytest.mark.long),
        pytest.param(5, 1, [2, 0], marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_then_killed_agents_cost_seconds_and_no_bit(tmp_path, undisturbed, nodes, spares, lost):
    """The first node's agent, too: the next one's leads then, from a snapshot in its own memory. A spare
    node takes the place of the first that is lost."""
    run, trains = tmp_path / "runs/run", nodes - spares
    more = ("run_dir=runs/run", "train.save_steps=1000", "checkpoint.memory_steps=1")
    more += (f"launch.spare_nodes={spares}",)
    with Agents(tmp_path, nodes, write_config(tmp_path, STEPS), *more) as job:
        wait_for_step(run, 1, 6)
        job.rank(1).kill()
        for number, node in enumerate(lost, 2):
            wait_for_step(run, number, 4 * number + 2)
            job.kill(node)
        left = [node for node in range(nodes) if node not in lost]
        assert {job.code(node) for node in left} == {0}, job.said(left[0])
        said = "".join(map(job.said, range(nodes)))
    found, hosts = attempts(run), [f"127.0.0.{node + 1}" for node in range(nodes)]
    gone = [[], *([hosts[node]] for node in lost), []]
    assert [one["lost"] for one in found] == gone
    assert [one["reason"] for one in found] == ["failed"] * (1 + len(lost)) + ["done"]
    assert found[0]["message"].startswith("rank 1 was killed by SIGKILL, not by qwenlora")
    for one, (host,) in zip(found[1:-1], gone[1:-1], strict=True):
        assert one["message"] == f"the agent of {host} is gone: killed, or its node failed"
    assert found[-1]["nodes"] == [hosts[node] for node in left]
    assert [one["processes"] for one in found] == [
        min(trains, nodes - number) for number in [0, *range(len(lost) + 1)]
    ]
    assert f"with {hosts[-1]} in place of" in said or not spares
    assert f", without {hosts[lost[-1]]}" in said or spares
    assert f"{hosts[left[0]]} leads now" in said or 0 not in lost
    assert all(one["steps_repeated"] <= 1 for one in found), "a step may end before its snapshot is whole"
    assert all(one["first_step"] >= 4 * number + 2 for number, one in enumerate(found) if number)
    assert (tmp_path / "exit-code").read_text() == "0", "srun's is the killed agent's"
    share = goodput([Attempt.model_validate(one) for one in found])
    assert found[-1]["goodput"] == pytest.approx(share, abs=0.01)
    assert_exact(run, undisturbed(trains))


def test_a_job_that_always_crashes_ends(tmp_path):
    config = write_config(tmp_path, STEPS)
    crash = ("train.learning_rate=1e30", "train.save_strategy=no", "train.save_steps=null")
    with Agents(tmp_path, 1, config, "run_dir=runs/run", *crash) as job:
        assert job.code() == 1
        assert "not tried again: 2 attempts failed in a row and saved no step (a crash loop)" in job.said()
    assert [one["reason"] for one in attempts(tmp_path / "runs/run")] == ["failed", "failed"]


@pytest.mark.long
@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_rank_is_ended_and_the_job_goes_on_without_its_node(tmp_path, undisturbed, hung):
    run = tmp_path / "runs/run"
    more = ("run_dir=runs/run", "launch.stall_timeout_s=15")
    with Agents(tmp_path, 2, write_config(tmp_path, STEPS), *more) as job:
        wait_for_step(run, 1, 6)
        job.rank(hung).send_signal(signal.SIGSTOP)
        assert job.code() == 0, job.said()
    found, host = attempts(run), f"127.0.0.{hung + 1}"
    assert [(one["reason"], one["processes"]) for one in found] == [("failed", 2), ("done", 2 - hung)]
    assert found[0]["message"].startswith(f"rank {hung} on {host}: no progress for ")
    assert found[0]["bad"] == [host]
    assert_exact(run, undisturbed(2))


@pytest.mark.long
def test_a_hung_agent_is_killed_and_the_next_node_leads(tmp_path, undisturbed):
    run = tmp_path / "runs/run"
    more = ("run_dir=runs/run", "launch.stall_timeout_s=15", "checkpoint.memory_steps=1")
    with Agents(tmp_path, 2, write_config(tmp_path, STEPS), *more) as job:
        wait_for_step(run, 1, 6)
        rank = job.rank(0)
        job.processes[0].send_signal(signal.SIGSTOP)
        rank.kill()
        assert job.code(1) == 0, job.said(1)
        assert job.code(0) == -signal.SIGKILL
        assert "hung for 15 s (launch.stall_timeout_s): killed" in job.said(0)
    found = attempts(run)
    assert [(one["reason"], one["lost"]) for one in found] == [("failed", ["127.0.0.1"]), ("done", [])]
    assert_exact(run, undisturbed(2))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_node_that_computes_a_fifth_of_the_time_is_named(tmp_path, strategy):
    """Under zero3, too, where it gives its part of each layer's weights late."""
    run, more = tmp_path / "runs/run", ("train.global_batch_size=2", "train.per_device_train_batch_size=1")
    (tmp_path / "parts.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    if strategy == "zero3":
        more += ("strategy.name=zero3", "strategy.deepspeed_config=parts.json", "log.logging_steps=25")
    with Agents(
        tmp_path, 2, write_config(tmp_path, 2000), "run_dir=runs/run", "train.save_steps=500", *more
    ) as job:
        wait_for_step(run, 1, 1)
        rank = job.rank(1)
        while "is slow" not in job.said():
            rank.suspend()
            time.sleep(0.04)
            rank.resume()
            time.sleep(0.01)
            assert job.processes[0].poll() is None
        until = time.monotonic() + 60
        while not (paces := RunFolder(run).read_paces()) or not paces.slow:
            assert time.monotonic() < until
        said = job.said()
    (line,) = paces.slow
    assert line.startswith(f"rank 1 on {paces.hosts[1]} is slow: ")
    assert f"warning: {line}" in said
    assert last_line(run / "metrics.jsonl", "slowest_rank")["slowest_rank"] == 1


@pytest.mark.long
def test_a_node_lost_while_rows_are_prepared_or_ranks_start_again(tmp_path, undisturbed):
    run = tmp_path / "runs/run"
    more = ("run_dir=runs/run", "launch.min_nodes=1", "checkpoint.memory_steps=1")
    with Agents(tmp_path, 4, write_config(tmp_path, STEPS), *more) as job:
        while "preparing model and data" not in job.said():
            time.sleep(0.02)
        job.kill(3)
        wait_for_step(run, 2, 4)
        job.kill(2)
        while len(attempts(run)) < 3:
            time.sleep(0.02)
        job.kill(1)
        assert job.code() == 0, job.said()
    found = attempts(run)
    assert [one["reason"] for one in found] == ["failed"] * 3 + ["done"]
    assert [one["processes"] for one in found] == [4, 3, 2, 1]
    assert_exact(run, undisturbed(3))


@pytest.mark.long
def test_nodes_lost_inside_a_save_in_the_restart_and_in_an_evaluation(tmp_path, undisturbed):
    """The first node loses itself while it writes its first checkpoint; the third while it starts again, when
    it has become the second; the last, which is the second then, while it evaluates."""
    run, more = tmp_path / "runs/run", ("run_dir=runs/run", "launch.min_nodes=1", "checkpoint.memory_steps=1")
    config = write_config(tmp_path, STEPS, evaluates=True)
    sabotage = {
        0: {"process": "rank-0", "operation": 6},
        2: {"process": "rank-1", "inside": "build", "nth": 1, "after_s": 0.2},
        3: {"process": "rank-1", "inside": "_sum_losses", "nth": 1, "after_s": 0.02},
    }
    with Agents(tmp_path, 4, config, *more, sabotage=sabotage) as job:
        assert job.code(1) == 0, job.said(1)
    found = attempts(run)
    assert [one["lost"] for one in found] == [[f"127.0.0.{node}"] for node in (1, 3, 4)] + [[]]
    in_save, in_restart, in_evaluation, last = found
    assert (in_save["last_step"], in_evaluation["last_step"]) == (4, 6)
    assert not in_restart.get("first_step")
    assert (last["reason"], last["first_step"]) == ("done", 6), "an evaluation comes before a snapshot"
    assert_exact(run, undisturbed(4, evaluates=True))


@pytest.mark.long
def test_random_disturbances(tmp_path):
    """Ranks, forkservers and two agents of four, maybe the first, are killed at any moment. SEED: to repeat a
    failure."""
    count, seed = (
        int(os.environ.get("DISTURBANCES", "20")),
        os.environ.get("SEED", str(time.time_ns() % 2**32)),
    )
    print(f"SEED={seed}")
    chance, run, agents = random.Random(seed), tmp_path / "runs/run", [0, 1, 2, 3]
    more = ("run_dir=runs/run", "launch.max_restarts=1000", "checkpoint.memory_steps=1", "train.save_steps=5")
    with Agents(tmp_path, 4, write_config(tmp_path, 100), *more) as job:
        done, ends = 0, time.monotonic() + 1200
        while done < count and time.monotonic() < ends and job.processes[agents[0]].poll() is None:
            saved = len(attempts(run)) if (run / "attempts.jsonl").exists() else 0
            wait_for_step(run, max(saved, 1), min(4 * done, 95), 120)
            time.sleep(chance.random())
            shutil.rmtree(run.parent / ".bad_nodes", ignore_errors=True)  # a node that fails twice is let go
            node = chance.choice(agents)
            way = chance.choice(["rank", "rank", "rank", "forkserver", "agent"])
            if way == "agent" and len(agents) == 2:
                way = "rank"
            print(done, way, node, flush=True)
            if way == "agent":
                agents.remove(node)
                job.kill(node)
            else:
                process = job.rank(node) if way == "rank" else job.rank(node).parent()
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            done += 1
        assert job.code(agents[0]) == 0, job.said(agents[0])
    found = attempts(run)
    assert found[-1]["reason"] == "done"
    print(f"{len(found)} attempts, goodput {found[-1]['goodput']:.0%}")
    locally(tmp_path, "my.yaml", "undisturbed", 4)
    expected, got = losses(tmp_path / "runs/undisturbed"), losses(run)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose([*got.values()], [*expected.values()], rtol=1e-5)
