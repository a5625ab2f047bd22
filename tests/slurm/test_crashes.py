"""What a failing job does: it is tried again when that can help, and left alone when it cannot."""

import json
import time
from pathlib import Path

import pytest
from slurm_runs import attempts, sbatch, wait_for_step, write_config

pytestmark = pytest.mark.slow
SABOTEUR = Path(__file__).parents[1] / "support" / "saboteur"


def said_by(folder, job):
    return (folder / f"slurm-{job}.out").read_text()


def test_a_job_that_always_crashes_is_tried_twice_and_no_more(cluster, tmp_path):
    config = write_config(tmp_path, 20)
    overrides = ["train.learning_rate=1e30", "train.save_strategy=no", "train.save_steps=null", "run_dir=runs/run"]
    job = sbatch(cluster, tmp_path, config, *overrides)
    cluster.wait(job, "FAILED", timeout=200)
    found = attempts(tmp_path / "runs/run")
    assert [one["reason"] for one in found] == ["failed", "failed"]
    said = said_by(tmp_path, job)
    assert "the loss is not finite" in said
    assert "not tried again: 2 attempts failed in a row and saved no step (a crash loop)" in said
    assert said.count("requeueing job") == 1


def test_a_job_whose_rank_dies_after_progress_is_restarted(cluster, tmp_path):
    """Rank 1, on the other node, is killed in the tenth step of each attempt; saves are every 4 steps."""
    config = write_config(tmp_path, 22)
    plan = {"process": "rank-1", "inside": "training_step", "nth": 20, "after_s": 0, "everyone": False}
    env = {"QWENLORA_CHAOS": json.dumps(plan), "PYTHONPATH": str(SABOTEUR)}
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", **env)
    cluster.wait(job, "COMPLETED", timeout=300)
    found = attempts(tmp_path / "runs/run")
    assert [one["reason"] for one in found] == ["failed"] * (len(found) - 1) + ["done"]
    assert len(found) > 1
    assert "rank 1 was killed by SIGKILL" in found[0]["message"]
    assert found[1]["first_step"] > 4
    assert "the last lines of " in said_by(tmp_path, job)


def test_a_cancelled_job_saves_and_is_left_alone(cluster, tmp_path):
    config = write_config(tmp_path, 400)
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run")
    wait_for_step(tmp_path / "runs/run", 1, 6)
    cluster.scancel(job)
    cluster.wait(job, "CANCELLED", timeout=60)
    (attempt,) = attempts(tmp_path / "runs/run")
    assert (attempt.get("reason", "-"), attempt["cause"]) in [("stopped", "CANCELLED"), ("-", "CANCELLED")]
    time.sleep(10)
    assert cluster.state(job).startswith("CANCELLED")
    assert len(attempts(tmp_path / "runs/run")) == 1
