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
    """One job: a rank is killed, then one hangs, then an agent is killed, all on the second node."""
    config, run = write_config(tmp_path, 80), tmp_path / "runs/run"
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", "launch.stall_timeout_s=15")
    harms = [
        ("-KILL", "-x", "rank-1"),
        ("-STOP", "-x", "rank-1"),
        ("-KILL", "-f", f"{QWENLORA} train my.yaml"),
    ]
    for number, (kind, *process) in enumerate(harms, 1):
        wait_for_step(run, number, 20 * number - 14)
        cluster.script("sh", "node2", "kill", kind, node_process(cluster, "node2", *process))
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
    assert headless["message"] == "the agent of node2 is gone: killed, or its node failed"
    assert headless["lost"] == ["node2"]
    assert hung["message"].startswith("rank 1 on node2: no progress for ")
    assert "its process is stopped" in hung["message"]
    assert "most recent call first" in (run / "logs/attempt-2/rank-0.log").read_text()
    assert all(
        after["first_step"] > 20 * number - 16 for number, after in enumerate([hung, headless, last], 1)
    )
    assert "the last lines of " in said_by(tmp_path, job)
    assert "Restarts=0" in cluster.scontrol("show", "job", job), "it did not wait in the queue"


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
