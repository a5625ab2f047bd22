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
    job = sbatch(cluster, tmp_path, config, *overrides, options=("--array=0",) * array)
    cluster.wait(f"{job}_0" if array else job, "FAILED", timeout=900)
    found = attempts(tmp_path / "runs/run")
    assert [one["reason"] for one in found] == ["failed", "failed"]
    said = said_by(tmp_path, job)
    assert "the loss is not finite" in said
    assert "not tried again: 2 attempts failed in a row and saved no step (a crash loop)" in said
    assert said.count("requeueing job") == 1


def test_a_job_whose_rank_dies_after_progress_is_restarted(cluster, tmp_path):
    config = write_config(tmp_path, 40)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run")
    wait_for_step(tmp_path / "runs/run", 1, 6)
    cluster.script("sh", "node2", "kill", "-KILL", node_process(cluster, "node2", "-x", "rank-1"))
    cluster.wait(job, "COMPLETED", timeout=900)
    first, second = attempts(tmp_path / "runs/run")
    assert (first["reason"], second["reason"]) == ("failed", "done")
    assert "rank 1 was killed by SIGKILL" in first["message"]
    assert second["first_step"] > 4
    assert "the last lines of " in said_by(tmp_path, job)


def test_an_agent_that_is_killed_does_not_cost_the_job(cluster, tmp_path):
    config = write_config(tmp_path, 40)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run")
    wait_for_step(tmp_path / "runs/run", 1, 6)
    cluster.script(
        "sh", "node2", "kill", "-KILL", node_process(cluster, "node2", "-f", f"{QWENLORA} train my.yaml")
    )
    cluster.wait(job, "COMPLETED", timeout=900)
    first, second = attempts(tmp_path / "runs/run")
    assert (first["reason"], second["reason"]) == ("failed", "done")
    assert first["message"] == "the agent of node2 is gone: killed, or its node failed"
    assert second["first_step"] > 4


def test_a_rank_that_hangs_on_another_node_is_named_and_the_job_comes_back(cluster, tmp_path):
    config = write_config(tmp_path, 60)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", "launch.stall_timeout_s=15")
    wait_for_step(tmp_path / "runs/run", 1, 6)
    cluster.script("sh", "node2", "kill", "-STOP", node_process(cluster, "node2", "-x", "rank-1"))
    cluster.wait(job, "COMPLETED", timeout=900)
    first, second = attempts(tmp_path / "runs/run")
    assert (first["reason"], second["reason"]) == ("failed", "done")
    assert first["message"].startswith("rank 1 on node2: no progress for ")
    assert "its process is stopped" in first["message"]
    assert "most recent call first" in (tmp_path / "runs/run/logs/attempt-1/rank-0.log").read_text()


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
