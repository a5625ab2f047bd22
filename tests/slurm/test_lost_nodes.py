"""Nodes that lose power and network at once: nobody says that they are gone."""

import time

import pytest
from slurm_runs import ALL_STEPS, assert_exact, attempts, locally, sbatch, wait_for_step, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(("lost", "left"), [("node2", "node1"), ("node1", "node2")])
def test_a_job_goes_on_without_a_node_that_says_nothing_more(netns_cluster, tmp_path, lost, left):
    """Without the first one, too, with which the batch shell and srun are gone. It comes back before the end,
    and is not used again: the job has it no more."""
    cluster, run = netns_cluster, tmp_path / "runs/run"
    more = ("run_dir=runs/run", "checkpoint.memory_steps=1")
    job = sbatch(cluster, tmp_path, write_config(tmp_path, 40), *more)
    wait_for_step(run, 1, 10)
    cluster.kill_node(lost)
    since = time.monotonic()
    try:
        wait_for_step(run, 2, 11)
        print(f"without {lost}: the next step after {time.monotonic() - since:.0f} s")
        assert "Restarts=0" in cluster.scontrol("show", "job", job)
        cluster.wait_down(lost)  # before that, srun would take its reset connection for the end of the step
    finally:
        cluster.start_node(lost)
    cluster.wait(job, "COMPLETED", timeout=900)
    first, last = attempts(run)
    assert (first["reason"], first["lost"], first["processes"]) == ("failed", [lost], 2)
    assert (last["reason"], last["nodes"], last["processes"]) == ("done", [left], 1)
    assert last["steps_repeated"] <= 1
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert "step 40/40" in said, "rank 0 has the job's output"
    requeues = f"requeueing job {job}: node1 is gone, and its batch shell; the run is done: it ends"
    assert (requeues in said) == (lost == "node1"), "nothing else ends a job without a batch shell"
    (folder := tmp_path / "undisturbed").mkdir()
    locally(folder, write_config(folder, 40), "run", 2, *ALL_STEPS)
    assert_exact(run, folder)
