"""Nodes that lose power and network at once: nobody says that they are gone."""

import pytest
from slurm_runs import attempts, sbatch, wait_for_step, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_job_goes_on_without_a_node_that_says_nothing_more(netns_cluster, tmp_path):
    cluster, run = netns_cluster, tmp_path / "runs/run"
    job = sbatch(cluster, tmp_path, write_config(tmp_path, 40), "run_dir=runs/run")
    wait_for_step(run, 1, 10)
    cluster.kill_node("node2")
    try:
        wait_for_step(run, 2, 12)
        assert "Restarts=0" in cluster.scontrol("show", "job", job)
    finally:
        cluster.start_node("node2")
    cluster.wait(job, "COMPLETED", timeout=900)
    first, last = attempts(run)
    assert (first["reason"], first["lost"], first["processes"]) == ("failed", ["node2"], 2)
    assert (last["reason"], last["processes"]) == ("done", 1)


def test_a_job_whose_first_node_says_nothing_more_is_requeued_by_the_others(netns_cluster, tmp_path):
    cluster, run = netns_cluster, tmp_path / "runs/run"
    job = sbatch(cluster, tmp_path, write_config(tmp_path, 40), "run_dir=runs/run")
    wait_for_step(run, 1, 10)
    cluster.kill_node("node1")
    try:
        cluster.wait(job, "PENDING", timeout=300)
    finally:
        cluster.start_node("node1")
    cluster.wait(job, "COMPLETED", timeout=900)
    first, last = attempts(run)
    assert (first["reason"], last["reason"]) == ("killed", "done")
    assert last["first_step"] > 4
