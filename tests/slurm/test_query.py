"""What a job can know of its end while its processes are being told to stop, and what Slurm does with one put
back."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenlora.slurm.query import ask, history, requeue

TASK = Path(__file__).with_name("stoppable.py")
BATCH = """#!/bin/bash
trap : TERM
srun --kill-on-bad-exit=1 "$PYTHON" "$TASK" "$FOLDER" & step=$!
wait $step
while kill -0 $step 2>/dev/null; do wait $step; done
wait $step
status=$?
file=$FOLDER/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.srun
echo $status > "$file.part" && mv "$file.part" "$file" # whole as soon as it is there
[ -z "$AFTER" ] || eval "$AFTER"
exit $status
"""


class Jobs:
    """Starts jobs that ask about themselves, and reads what they were answered."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        (folder / "job.sh").write_text(BATCH)

    def start(self, *options, after="", wait=True):
        names = {"PYTHON": sys.executable, "TASK": str(TASK), "FOLDER": str(self.folder), "AFTER": after}
        job_id = self.cluster.sbatch(
            "--output=/dev/null", *options, "job.sh", "a b", cwd=self.folder, env=names
        )
        if wait:
            self.file(f"{job_id}.0.0.started")
        return job_id

    def file(self, name, timeout=500):
        deadline = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"no {name}: {self.cluster.run('squeue', '-l').stdout}"
            time.sleep(0.05)
        return self.folder / name

    def heard(self, job_id):
        """Return the signals of rank 0 of the first incarnation, and its answers: of now, of that
        incarnation."""
        record = json.loads(self.file(f"{job_id}.0.0.json").read_text())
        assert all(took < 2 for _, _, took in record["answers"])
        return record["signals"], *zip(*[each[:2] for each in record["answers"]], strict=True)

    def srun_status(self, job_id):
        return int(self.file(f"{job_id}.0.srun").read_text())


@pytest.fixture
def jobs(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield Jobs(cluster, tmp_path)
    cluster.wait_idle()


def states(answers):
    return {each["state"] for each in answers}


def test_a_stopped_job_knows_why(cluster, jobs):
    timed_out = jobs.start("--time=1")  # ends last: Slurm looks at limits every 30 s
    cancelled, requeued, held = jobs.start(), jobs.start(), jobs.start()
    cluster.scancel(cancelled)
    cluster.scontrol("requeue", requeued)
    cluster.scontrol("requeuehold", held)
    cluster.scontrol("update", f"jobid={timed_out}", "EndTime=now+1seconds")
    for job_id, state in (
        (cancelled, "CANCELLED"),
        (requeued, "REQUEUED"),
        (held, "REQUEUED"),
        (timed_out, "TIMEOUT"),
    ):
        signals, now, mine = jobs.heard(job_id)
        assert set(signals) == {"SIGTERM"}
        assert states(now) == states(mine) == {state}
        assert all(each["completing"] for each in now)
        assert jobs.srun_status(job_id) == 75
    assert requeue(held) == ""
    cluster.wait(held, "PENDING")
    assert ask(held).reason == "job_requeued_in_held_state"
    assert [job.state for job in history(timed_out)] == ["TIMEOUT"]


def test_a_signal_ahead_of_the_time_limit_finds_a_running_job_with_the_time_left(cluster, jobs):
    job_id = jobs.start("--time=1:00:00")
    assert ask(job_id).seconds_left == pytest.approx(3600, abs=30)
    cluster.scancel("--signal=USR1", job_id)
    signals, now, _ = jobs.heard(job_id)
    assert signals == ["SIGUSR1"]
    assert states(now) == {"RUNNING"}
    assert not any(each["completing"] or each["preempted"] for each in now)


def test_preemption_is_known_at_once_and_in_the_time_of_grace_beforehand(cluster, jobs):
    at_once = jobs.start("--partition=low", "--nodelist=node1")
    graced = jobs.start("--partition=grace", "--nodelist=node2", "--time=60", "--signal=USR1@30")
    plain = jobs.start("--partition=grace", "--nodelist=node2", "--time=60")
    time.sleep(1)
    jobs.start("--partition=high", "--nodes=2", "--exclusive", wait=False)
    signals, now, mine = jobs.heard(at_once)
    assert set(signals) == {"SIGTERM"}
    assert states(now) == states(mine) == {"PREEMPTED"}
    for job_id, signal in ((graced, "SIGUSR1"), (plain, "SIGTERM")):
        signals, now, mine = jobs.heard(job_id)
        assert signals == [signal]
        assert states(now) == states(mine) == {"RUNNING"}
        assert all(each["preempted"] and 10 < each["seconds_left"] <= 20 for each in now)
    for job_id in (graced, plain):  # who leaves in the time of grace is not put back
        assert cluster.wait(job_id, "FAILED") == "FAILED"


def test_a_lost_node_is_known(cluster, jobs):
    down = jobs.start("--nodelist=node1")
    off = jobs.start("--nodes=2")
    cluster.kill_node("node2")
    cluster.scontrol("update", "nodename=node1", "state=down", "reason=test")
    try:
        for job_id in (down, off):
            _, _, mine = jobs.heard(job_id)
            assert states(mine) == {"NODE_FAIL"}
        assert jobs.srun_status(down) == 0  # srun leaves before its task: only Slurm says what happened
        assert history(down)[0].state == "NODE_FAIL"
        assert cluster.state(down) in ("PENDING", "RUNNING")
    finally:
        cluster.start_node("node2")
        cluster.wait_idle()


def test_a_job_puts_itself_back_after_its_srun_has_ended(cluster, jobs):
    again = 'scontrol requeue "$SLURM_JOB_ID"'
    job_id = jobs.start("--time=1:00:00", after=again)
    cluster.scancel("--signal=USR1", job_id)
    assert jobs.srun_status(job_id) == 75
    jobs.file(f"{job_id}.1.0.started")
    now = ask(job_id)
    assert (now.state, now.restarts, now.requeue, now.nodes) == ("RUNNING", 1, True, ("node1",))
    assert ask(job_id, 0).state == "REQUEUED"
    assert [job.state for job in history(job_id)] == ["REQUEUED", "RUNNING"]


def test_one_task_of_an_array_is_put_back_alone(cluster, jobs):
    array = jobs.start("--array=0-1", wait=False)
    for task in (0, 1):
        cluster.wait(f"{array}_{task}", "RUNNING")
    last = ask(array)  # the array's number is also that of one task
    assert last.job_id == f"{array}_1"
    assert requeue(array) == ""
    assert ask(f"{array}_0").state == "RUNNING"
    assert ask(f"{array}_1", 0).state == "REQUEUED"


def test_names_with_spaces_are_read_whole(cluster, jobs):
    folder = jobs.folder / "a dir"
    folder.mkdir()
    (folder / "train it.sh").write_text("#!/bin/bash\nsleep 30\n")
    options = [
        "--hold",
        "--job-name=my name Reason=x",
        "--output=o %j.txt",
        "train it.sh",
        "a.yaml",
        "k=v JobState=FAILED",
    ]
    job_id = cluster.sbatch(*options, cwd=folder)
    job = ask(job_id)
    assert (job.state, job.name, job.work_dir) == ("PENDING", "my name Reason=x", folder)
    assert job.command == f"{folder}/train it.sh a.yaml k=v JobState=FAILED"
    assert job.stdout == folder / f"o {job_id}.txt"
    assert (job.end, job.seconds_left, job.nodes) == (None, None, ())


def test_no_slurm_and_no_such_job_are_no_answer(cluster, jobs, monkeypatch):
    assert (ask("999999"), history("999999"), requeue("999999")) == (None, [], "Slurm does not know the job")
    monkeypatch.setenv("PATH", "/nowhere")
    assert (ask("1"), history("1"), requeue("1")) == (None, [], "Slurm does not know the job")


def test_two_clusters_live_side_by_side_and_one_goes_with_its_owner(cluster, tmp_path):
    owner = subprocess.Popen(["sleep", "60"])
    other = type(cluster)(tmp_path / "other")
    other.environment["OWNER"] = str(owner.pid)
    try:
        other.script("up")
        assert other.run("srun", "hostname").stdout == cluster.run("srun", "hostname").stdout == "node1\n"
        controller = int((tmp_path / "other" / "pid" / "ctl").read_text())
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 120
        while Path(f"/proc/{controller}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        owner.kill()
        other.script("down")
    assert cluster.run("srun", "hostname").stdout == "node1\n"


def test_nodes_with_a_network_of_their_own_run_jobs(netns_cluster):
    answer = netns_cluster.run("srun", "-N2", "sh", "-c", "hostname; ip -brief address show eth0")
    assert set(answer.stdout.split()) >= {"node1", "node2", "10.213.7.11/24", "10.213.7.12/24"}
