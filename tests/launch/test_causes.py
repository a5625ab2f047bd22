"""What Slurm is recorded to have done to an attempt."""

import subprocess

import pytest

from qwenlora.launch.causes import cause_of_kill, cause_of_stop
from qwenlora.run.records import Attempt, now
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo


@pytest.mark.parametrize(
    ("job", "stop_signal", "cause"),
    [
        (None, "SIGTERM", ""),
        (JobInfo("31", "PREEMPTED"), "SIGTERM", "PREEMPTED"),
        (JobInfo("31", "NODE_FAIL", completing=True), "SIGTERM", "NODE_FAIL"),
        (JobInfo("31", "RUNNING", preempted=True, requeue=True), "SIGUSR1", "PREEMPTED"),
        (JobInfo("31", "RUNNING", seconds_left=100.0, requeue=True), "SIGUSR1", "TIMEOUT"),
        (JobInfo("31", "RUNNING", seconds_left=100.0, requeue=True), "SIGTERM", ""),
        (JobInfo("31", "RUNNING", seconds_left=9000.0, requeue=True), "SIGUSR1", ""),
        (JobInfo("31", "RUNNING", seconds_left=None, requeue=True), "SIGUSR1", ""),
        (JobInfo("31", "RUNNING", seconds_left=100.0, requeue=False), "SIGUSR1", "CANCELLED"),
    ],
)
def test_what_slurm_does_to_a_job_that_is_asked_to_stop(job, stop_signal, cause, monkeypatch):
    monkeypatch.setenv("QWENLORA_LEAD_S", "USR1")  # no number: nothing may be raised
    assert cause_of_stop(job, stop_signal) == cause


@pytest.mark.parametrize(
    ("states", "restarts", "cause"),
    [
        (["NODE_FAIL", "PREEMPTED", "RUNNING"], 0, "NODE_FAIL"),
        (["NODE_FAIL", "PREEMPTED", "RUNNING"], 1, "PREEMPTED"),
        (["NODE_FAIL", "RUNNING"], 1, ""),  # the same job goes on: only the attempt was killed
        (["NODE_FAIL", "PENDING"], 1, ""),
        (["NODE_FAIL"], 1, ""),  # the accounting is late
        ([], 0, ""),  # there is no accounting
    ],
)
def test_a_killed_attempt_ended_as_its_incarnation_of_the_job_did(states, restarts, cause, monkeypatch):
    monkeypatch.setattr(query, "history", lambda job_id: [JobInfo(job_id, state) for state in states])
    assert cause_of_kill(Attempt(attempt=1, start=now(), job_id="31", restarts=restarts)) == cause


def test_without_a_job_slurm_is_not_asked(monkeypatch):
    monkeypatch.setattr(query, "history", lambda job_id: pytest.fail("asked"))
    assert cause_of_kill(Attempt(attempt=1, start=now())) == ""


def test_a_job_that_went_on_with_fewer_nodes_is_one_incarnation_in_the_accounting(monkeypatch):
    """sacct has a line of its own for the time until Slurm took the node from the job."""
    fields = ["7", "7", "RESIZING", "None", "node[1-3]", "/w", "my", "100", "101", "150"]
    after = ["7", "7", "TIMEOUT", "None", "node[1-2]", "/w", "my", "100", "150", "200"]
    lines = "".join(query.SEPARATOR.join(line) + "\n" for line in (fields, after))
    monkeypatch.setattr(query, "_run", lambda *_: subprocess.CompletedProcess([], 0, lines, ""))
    (job,) = query.history("7")
    assert (job.state, job.restarts, job.nodes) == ("TIMEOUT", 0, ("node1", "node2"))
