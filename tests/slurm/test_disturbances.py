"""Whatever the cluster does to a job, it comes back by itself and ends with the adapter of an undisturbed
run."""

import json
import os
import random
import signal
import time

import pytest
from slurm_runs import adapter, attempts, locally, node_process, sbatch, wait_for_step, write_config

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the adapter of a run of two processes on one machine, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    locally(folder, write_config(folder, STEPS), "run", 2)
    return adapter(folder / "runs/run")


class Disturber:
    """Does to a job what clusters do. Each method returns what attempts.jsonl must say of it, and so must
    sacct."""

    def __init__(self, cluster, job):
        self.cluster, self.job = cluster, job

    def tell_to_save(self):
        self.cluster.scancel("--signal=USR1", self.job)
        return {"stopped"}, {None}

    def requeue(self):
        self.cluster.scontrol("requeue", self.job)
        return {"stopped", "killed"}, {"REQUEUED"}

    def requeue_and_hold(self):
        self.cluster.scontrol("requeuehold", self.job)
        self.cluster.wait(self.job, "PENDING", timeout=900)
        time.sleep(2)
        self.cluster.scontrol("release", self.job)
        return {"stopped", "killed"}, {"REQUEUED"}

    def preempt(self):
        """A job of a higher partition wants both nodes; without grace, everything is killed after
        KillWait."""
        job = self.cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd="/")
        self.cluster.wait(job, "COMPLETED", timeout=900)
        return {"stopped", "killed"}, {"PREEMPTED"}

    def take_a_node_down(self):
        self.cluster.scontrol("update", "NodeName=node2", "State=DOWN", "Reason=test")
        time.sleep(1)
        # unless slurmd has registered, and so is taken back, already
        self.cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)
        return {"stopped", "killed", "failed"}, {"NODE_FAIL"}

    def power_a_node_off(self):
        self.cluster.kill_node("node2")
        end = time.monotonic() + 180
        while "State=DOWN" not in self.cluster.scontrol(
            "show", "node", "node2"
        ):  # Slurm sees it after some 17 s
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(1)
        self.cluster.start_node("node2")
        return {"stopped", "killed", "failed"}, {"NODE_FAIL"}


def submit(cluster, folder, partition="low", **options):
    config = write_config(folder, STEPS)
    chosen = [f"--{name}={value}" for name, value in options.items()]
    more = ("run_dir=runs/run", "launch.min_nodes=2")  # on one node the adapter would be another one's
    return sbatch(cluster, folder, config, *more, options=(f"--partition={partition}", *chosen))


def assert_came_through(cluster, folder, job, said, undisturbed):
    """The job is done, after exactly these attempts, and the adapter is the undisturbed one to the bit."""
    cluster.wait(job, "COMPLETED", timeout=900)
    run = folder / "runs/run"
    found = attempts(run)
    assert [one["job_id"] for one in found] == [job] * (len(said) + 1)
    for one, (reasons, causes) in zip(found, said, strict=False):
        assert one["reason"] in reasons, one
        assert one.get("cause") in causes, one
    assert found[-1]["reason"] == "done"
    assert adapter(run) == undisturbed


@pytest.mark.parametrize(
    ("partition", "ways"),
    [
        ("grace", ("tell_to_save", "preempt", "power_a_node_off")),
        pytest.param(
            "low", ("requeue", "take_a_node_down", "preempt", "requeue_and_hold"), marks=pytest.mark.long
        ),
    ],
)
def test_what_ends_a_job_in_one_run_after_the_other(cluster, tmp_path, undisturbed, partition, ways):
    job = submit(cluster, tmp_path, partition)
    disturber, said = Disturber(cluster, job), []
    for number, way in enumerate(ways, 1):
        wait_for_step(tmp_path / "runs/run", number, 1 + 14 * number)
        said.append(getattr(disturber, way)())
    assert_came_through(cluster, tmp_path, job, said, undisturbed)
    if partition == "grace":  # time enough to save the step that is under way
        told, preempted, powered_off, _ = attempts(tmp_path / "runs/run")
        assert (told["reason"], preempted["reason"]) == ("stopped", "stopped")
        assert preempted["first_step"] == told["last_step"] + 1
        assert powered_off["first_step"] == preempted["last_step"] + 1


@pytest.mark.long
def test_a_job_takes_the_nodes_that_are_free_each_time_it_starts(netns_cluster, tmp_path):
    """All four, then two, then three: all that differs is rounding."""
    cluster, config, run = netns_cluster, write_config(tmp_path, 40), tmp_path / "runs/run"
    cluster.wait_idle()
    job = sbatch(cluster, tmp_path, config, "run_dir=runs/run", options=("--nodes=1-4",))
    for number, busy in enumerate(["node2,node3", "node1"], 1):
        wait_for_step(run, number, 12 * number)
        cluster.scancel("--signal=USR1", job)
        cluster.wait(job, "PENDING")
        other = cluster.sbatch("--exclusive", f"--nodelist={busy}", "--wrap=sleep 900", cwd="/")
        cluster.wait(other, "RUNNING")
        wait_for_step(run, number + 1, 12 * number)
        cluster.scancel(other)
    cluster.wait(job, "COMPLETED", timeout=900)
    assert [one["processes"] for one in attempts(run)] == [4, 2, 3]
    locally(tmp_path, config, "alone", 1)
    of_run, alone = (metrics(tmp_path / "runs" / name) for name in ("run", "alone"))
    assert [(line["step"], line["learning_rate"]) for line in of_run] == [
        (line["step"], line["learning_rate"]) for line in alone
    ]
    losses = [[line["loss"] for line in lines] for lines in (of_run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def metrics(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_the_signal_before_the_time_limit_saves_and_the_job_goes_on(cluster, tmp_path, undisturbed):
    """Slurm looks at its clock every 30 s. So that the run is not over before, a rank is stopped, and goes on
    as soon as Slurm's signal has come to it."""
    job = submit(cluster, tmp_path, partition="main", signal="USR1@60")
    wait_for_step(tmp_path / "runs/run", 1, 10)
    rank = node_process(cluster, "node2", "-x", "rank-1")
    cluster.script("sh", "node2", "kill", "-STOP", rank)
    cluster.scontrol("update", f"JobId={job}", "EndTime=now+50seconds")
    end = time.monotonic() + 300
    while not has_come(cluster, "node2", rank, signal.SIGUSR1):
        assert time.monotonic() < end, "no signal"
        time.sleep(0.2)
    cluster.script("sh", "node2", "sh", "-c", f"kill -CONT {rank} || true")
    cluster.wait(job, "PENDING")
    cluster.scontrol("update", f"JobId={job}", "TimeLimit=20")
    assert_came_through(cluster, tmp_path, job, [({"stopped"}, {"TIMEOUT"})], undisturbed)
    first, second = attempts(tmp_path / "runs/run")
    assert second["first_step"] == first["last_step"] + 1


def has_come(cluster, node, pid, number):
    """Tell whether a signal waits for a stopped process, or has ended it: Slurm may have it go on itself."""
    pending = cluster.script("sh", node, "sh", "-c", f"grep -s ^ShdPnd: /proc/{pid}/status || true").split()
    return not pending or bool(int(pending[1], 16) >> (number - 1) & 1)


@pytest.mark.long
def test_random_disturbances(cluster, tmp_path, undisturbed):
    count, seed = (
        int(os.environ.get("SLURM_DISTURBANCES", "10")),
        int(os.environ.get("SLURM_SEED", time.time_ns() % 2**32)),
    )
    print(f"SLURM_SEED={seed}")
    random.seed(seed)
    job = submit(cluster, tmp_path)
    disturber, said = Disturber(cluster, job), []
    ways = ["tell_to_save", "requeue", "preempt", "take_a_node_down", "power_a_node_off"]
    for number in range(1, count + 1):
        wait_for_step(tmp_path / "runs/run", number, number * (STEPS - 5) // (count + 1))
        time.sleep(random.random())
        way = random.choice(ways)
        print(number, way, flush=True)
        said.append(getattr(disturber, way)())
    assert_came_through(cluster, tmp_path, job, said, undisturbed)
