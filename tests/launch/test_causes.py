"""What Slurm is recorded to have done to an attempt."""

import subprocess
import time

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


def accounting(monkeypatch, *records):
    """Have sacct answer with these records: state, nodes, submit, start, end."""
    lines = "".join(
        query.SEPARATOR.join(["7", "7", state, "None", nodes, "/w", "my", *times]) + "\n"
        for state, nodes, *times in records
    )
    monkeypatch.setattr(query, "_run", lambda *_: subprocess.CompletedProcess([], 0, lines, ""))


def test_a_job_that_went_on_with_fewer_nodes_is_one_incarnation_in_the_accounting(monkeypatch):
    """sacct has a line of its own for the time until Slurm took the node from the job."""
    resized, after = (
        ("RESIZING", "node[1-3]", "100", "101", "150"),
        ("TIMEOUT", "node[1-2]", "150", "150", "200"),
    )
    accounting(monkeypatch, resized, after)
    (job,) = query.history("7")
    assert (job.state, job.restarts, job.nodes) == ("TIMEOUT", 0, ("node1", "node2"))


def test_incarnations_after_a_lost_node_end_in_the_record_of_the_one_that_lost_it(monkeypatch):
    """As Slurm 22.05 recorded a job that was requeued, lost a node, was requeued, and then preempted."""
    accounting(
        monkeypatch,
        ("REQUEUED", "node[1-2]", "100", "101", "110"),
        ("RESIZING", "node[1-2]", "112", "119", "131"),
        ("PREEMPTED", "node1", "131", "131", "155"),
        ("PENDING", "node[1-2]", "132", "Unknown", "Unknown"),
        ("PENDING", "node[1-2]", "136", "144", "Unknown"),
    )
    assert [job.state for job in query.history("7")] == ["REQUEUED", "PREEMPTED"]
    assert query.ask("7").state == "PREEMPTED", "when only the accounting remembers it"
    assert query.ended("7", 0, 101.5).state == "REQUEUED"
    assert query.ended("7", 3, 144.5).state == "PREEMPTED"
    assert query.ended("7", 4, 160.5) is None, "the end of the one before"


@pytest.mark.parametrize(
    ("end", "state"), [(None, "REQUEUED"), (1200.0, "REQUEUED"), (-0.5, "CANCELLED"), (5.0, "CANCELLED")]
)
def test_without_accounting_a_job_that_is_stopped_was_cancelled_if_it_ends_now(monkeypatch, end, state):
    """One that was put back has no end, or that of its time limit. end: in so many seconds."""
    job = JobInfo("7", "COMPLETING", completing=True, restarts=1, end=end and time.time() + end)
    monkeypatch.setattr(query, "show", lambda _: job)
    monkeypatch.setattr(query, "history", lambda _: [])
    monkeypatch.setattr(query, "PATIENCE", 0.0)
    assert query.ask("7", 0).state == state
