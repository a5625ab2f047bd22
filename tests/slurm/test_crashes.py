"""What a failing job does: it is tried again when that can help, and left alone when it cannot."""

import time

import pytest
from slurm_runs import QWENLORA, attempts, node_process, sbatch, wait_for_step, write_config

pytestmark = pytest.mark.slow


def said_by(folder, job):
    return (folder / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize(
    "array", [pytest.param(False, id="job", marks=pytest.mark.long), pytest.param(True, id="array")]
)
def test_a_job_that_always_crashes_is_tried_twice_and_no_more(cluster, tmp_path, array):
    config = write_config(tmp_path, 20)
    overrides = [
        "train.learning_rate=1e30",
        "train.save_strategy=no",
        "train.save_steps=null",
        "run_dir=runs/run",
    ]
    job = sbatch(cluster, tmp_path, config, *overrides, options=("--nodes=1", "--array=0")[: 1 + array])
    cluster.wait(f"{job}_0" if array else job, "FAILED", timeout=900)
    found = attempts(tmp_path / "runs/run")
    assert [one["reason"] for one in found] == ["failed", "failed"]
    said = said_by(tmp_path, job)
    assert "the loss is not finite" in said
    assert "not tried again: 2 attempts failed in a row and saved no step (a crash loop)" in said
    assert "requeueing" not in said


def test_a_job_goes_on_by_itself_after_what_ends_a_rank_or_an_agent(cluster, tmp_path):
    """One job: a rank is killed, then one of the first node hangs, then the first node's agent is killed."""
    config, run = write_config(tmp_path, 80), tmp_path / "runs/run"
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", "launch.stall_timeout_s=15")
    harms = [
        ("node2", "-KILL", "-x", "rank-1"),
        ("node1", "-STOP", "-x", "rank-0"),
        ("node1", "-KILL", "-f", f"bin/python[0-9.]* {QWENLORA} train my.yaml"),  # and not srun
    ]
    for number, (node, kind, *process) in enumerate(harms, 1):
        wait_for_step(run, number, 20 * number - 14)
        cluster.script("sh", node, "kill", kind, node_process(cluster, node, *process))
    cluster.wait(job, "COMPLETED", timeout=900)
    found = attempts(run)
    assert [(one["reason"], one["processes"]) for one in found] == [
        ("failed", 2),
        ("failed", 2),
        ("failed", 2),
        ("done", 1),
    ]
    killed, hung, headless, last = found
    assert "rank 1 was killed by SIGKILL" in killed["message"]
    assert headless["message"] == "the agent of node1 is gone: killed, or its node failed"
    assert (headless["lost"], last["nodes"]) == (["node1"], ["node2"])
    assert hung["message"].startswith("rank 0 on node1: no progress for ")
    assert hung["bad"] == ["node1"]
    assert "node1 cannot be left out" in said_by(tmp_path, job), "there are but two nodes"
    assert "its process is stopped" in hung["message"]
    assert "most recent call first" in (run / "logs/attempt-2/rank-1.log").read_text()
    assert all(
        after["first_step"] > 20 * number - 16 for number, after in enumerate([hung, headless, last], 1)
    )
    assert "the last lines of " in said_by(tmp_path, job)
    assert "Restarts=0" in cluster.scontrol("show", "job", job), "it did not wait in the queue"


def test_a_job_leaves_the_node_on_which_it_failed_twice(cluster, tmp_path):
    """It runs on the other node when it is requeued; there is none to leave that one for."""
    config, run = write_config(tmp_path, 24), tmp_path / "runs/run"
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", options=("--nodes=1",))
    for attempt, step in ((1, 5), (2, 10)):
        wait_for_step(run, attempt, step)
        (node,) = attempts(run)[-1]["nodes"]
        cluster.script("sh", node, "kill", "-KILL", node_process(cluster, node, "-x", "rank-0"))
    cluster.wait(job, "COMPLETED")
    first, second, last = attempts(run)
    (bad,) = second["bad"]
    assert first["nodes"] == second["nodes"] == [bad] != last["nodes"]
    assert (first["bad"], last["bad"], last["reason"]) == ([], [], "done")
    assert last["first_step"] > 8, "it goes on"
    assert f"ExcNodeList={bad}\n" in cluster.scontrol("show", "job", job)
    said = said_by(tmp_path, job)
    assert f"warning: {bad} is a bad node: rank 0 was killed by SIGKILL" in said
    assert f"requeueing without {bad}" in said
    entries = cluster.run(QWENLORA, "nodes", "runs", cwd=tmp_path).stdout.splitlines()
    assert sum(line.startswith(f"{bad}  bad ") for line in entries) == 2
    for needed, option in ((1, f"--exclude={bad}\n"), (2, "\n")):
        assert cluster.run(QWENLORA, "nodes", "--sbatch", needed, "runs", cwd=tmp_path).stdout == option


def test_a_cancelled_job_saves_and_is_left_alone(cluster, tmp_path):
    config = write_config(tmp_path, 400)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run")
    wait_for_step(tmp_path / "runs/run", 1, 6)
    cluster.scancel(job)
    cluster.wait(job, "CANCELLED", timeout=900)
    (attempt,) = attempts(tmp_path / "runs/run")
    assert (attempt.get("reason", "-"), attempt["cause"]) in [("stopped", "CANCELLED"), ("-", "CANCELLED")]
    time.sleep(10)
    assert cluster.state(job).startswith("CANCELLED")
    assert len(attempts(tmp_path / "runs/run")) == 1
