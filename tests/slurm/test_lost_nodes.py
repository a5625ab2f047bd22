"""Nodes that lose power and network at once: nobody says that they are gone."""

import time

import pytest
from slurm_runs import ALL_STEPS, assert_exact, attempts, locally, sbatch, wait_for_step, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]
NODES = ["node1", "node2", "node3", "node4"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of an undisturbed run of four ranks, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    locally(folder, write_config(folder, 40), "run", 4, *ALL_STEPS)
    return folder


@pytest.mark.parametrize("lost", [["node2"], ["node1"], ["node2", "node1"]], ids="-".join)
def test_a_job_goes_on_without_nodes_that_say_nothing_more(netns_cluster, tmp_path, undisturbed, lost):
    """Without the first one, too, with which the batch shell and srun are gone. Each comes back while the job
    runs, and is not used again: the job has it no more."""
    cluster, run = netns_cluster, tmp_path / "runs/run"
    more = ("run_dir=runs/run", "checkpoint.memory_steps=1")
    job = sbatch(cluster, tmp_path, write_config(tmp_path, 40), *more, options=("--nodes=4",))
    for number, node in enumerate(lost, 1):
        wait_for_step(run, number, 10 * number)
        cluster.kill_node(node)
        since = time.monotonic()
        try:
            wait_for_step(run, number + 1, 10 * number + 1)
            print(f"without {node}: the next step after {time.monotonic() - since:.0f} s")
            assert "Restarts=0" in cluster.scontrol("show", "job", job)
            cluster.wait_down(node)  # before that, srun would take its reset connection for the step's end
        finally:
            cluster.start_node(node)
    cluster.wait(job, "COMPLETED", timeout=900)
    *ended, last = attempts(run)
    assert [(one["reason"], one["lost"]) for one in ended] == [("failed", [node]) for node in lost]
    assert [one["processes"] for one in (*ended, last)] == [4, 3, 2][: 1 + len(lost)]
    left = [node for node in NODES if node not in lost]
    assert (last["reason"], last["nodes"]) == ("done", left)
    assert all(one["steps_repeated"] <= 1 for one in (*ended, last))
    print("of them seconds from an attempt's start:", [one["seconds"] for one in (*ended, last)])
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert "step 40/40" in said, "rank 0 has the job's output"
    requeues = f"requeueing job {job}: node1 is gone, and its batch shell; the run is done: it ends"
    assert (requeues in said) == ("node1" in lost), "nothing else ends a job without a batch shell"
    assert_exact(run, undisturbed)
