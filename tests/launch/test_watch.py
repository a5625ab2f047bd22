"""What an agent looks at while its ranks run, and how the end of an attempt is told."""

import io
import os
import re
import signal
import subprocess
import time
from contextlib import ExitStack

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import watch as watching
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.causes import cause_of_stop
from qwenlora.launch.meeting import Meeting
from qwenlora.launch.messages import RankPosition, RanksEnded, RunOver
from qwenlora.launch.node import Node
from qwenlora.launch.verdict import conclude, first_error
from qwenlora.launch.watch import Watch
from qwenlora.run import heartbeat
from qwenlora.run.folder import RunFolder
from qwenlora.run.heartbeat import Beat
from qwenlora.run.records import RankError
from qwenlora.slurm.query import JobInfo

HOSTS = ("127.0.0.1", "127.0.0.2")


class Children:
    def __init__(self, why=""):
        self.stop_requested, self.stop_signal, self.killed = bool(why), why, False

    def kill(self):
        self.killed = True


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        "model: {name_or_path: tiny}\ndata: {train: example}\nlaunch: {nproc_per_node: 1, stall_timeout_s:"
        " 1}\n"
    )
    return load_config(file, {"run_dir": str(tmp_path / "run")})


@pytest.fixture
def folder(config):
    folder = RunFolder(config.run_dir)
    folder.path.mkdir()
    folder.begin_attempt(2)
    return folder


@pytest.fixture
def watches(config, folder):
    """Return the watches of two nodes that have met."""
    first, second = (Allocation(number, HOSTS, "31", 0, False) for number in range(2))
    with Meeting(first) as here, Meeting(second) as there, ExitStack() as stack:
        there.join(5.0, lambda: False)
        while not here._peers:
            time.sleep(0.01)
        yield tuple(
            Watch(Node(config, allocation, Children(), meeting, Console(file=io.StringIO()), stack), 1)
            for allocation, meeting in ((first, here), (second, there))
        )


def until(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_node_whose_ranks_failed_ends_those_of_all_after_a_grace(watches, monkeypatch):
    monkeypatch.setattr(watching, "GRACE_S", 0.3)
    first, second = watches
    second.node.meeting.send(RanksEnded(code=1))
    until(
        lambda: (
            first.while_training()
            or second.while_training()
            or (first.node.children.killed and second.node.children.killed)
        )
    )
    assert not first.fault
    assert not second.fault


def test_a_node_whose_ranks_are_done_ends_nobody(watches):
    first, _ = watches
    watches[1].node.meeting.send(RanksEnded(code=0))
    time.sleep(0.2)
    first.while_training()
    first.after(0)  # returns: all have ended
    assert not first.node.children.killed


def test_an_agent_that_is_gone_is_named(watches):
    first, second = watches
    second.node.meeting.__exit__()
    until(lambda: first.while_training() or first.node.children.killed)
    assert first.fault == "the agent of 127.0.0.2 is gone: killed, or its node failed"
    first.after(1)  # and nobody waits for it


def test_a_node_that_has_ended_may_leave(watches):
    first, second = watches
    second.node.meeting.send(RanksEnded(code=0))
    time.sleep(0.1)
    second.node.meeting.__exit__()
    time.sleep(0.2)
    first.while_training()
    assert not first.fault
    assert not first.node.children.killed


def test_the_end_of_all_reaches_a_node_that_still_trains(watches):
    first, second = watches
    first.node.meeting.send(RunOver())
    until(lambda: second.while_training() or second.run_over)


def test_ranks_that_give_no_sign_of_life_end_the_attempt(watches, monkeypatch):
    monkeypatch.setattr(watching, "STACKS_S", 2.0)
    first, second = watches
    with heartbeat.make_folder() as here, heartbeat.make_folder() as there:
        deaf = lambda: signal.signal(heartbeat.STACKS_SIGNAL, signal.SIG_IGN)  # noqa: E731
        sleepers = [subprocess.Popen(["sleep", "60"], preexec_fn=deaf) for _ in range(2)]
        for folder, rank, process, beats in ((here, 0, sleepers[0], 5), (there, 1, sleepers[1], 4)):
            heart = heartbeat.Heart(folder, rank)
            monkeypatch.setattr(os, "getpid", lambda pid=process.pid: pid)
            for _ in range(beats):
                heart.beat(3)
        monkeypatch.undo()
        first.beats, second.beats = here, there
        first.started = second.started = time.monotonic() - 10
        time.sleep(1.1)
        second.while_training()
        first.while_training()
        who = (
            r"rank 1 on 127\.0\.0\.2: no progress for \d s \(launch\.stall_timeout_s is 1\), in step 3,"
            r" the others"
        )
        assert re.match(who, first.fault)
        assert first.node.children.killed
        until(lambda: second.while_training() or second.node.children.killed)
        for process in sleepers:
            process.kill()
            process.wait()


def test_a_slow_start_is_no_stall(watches):
    first, _ = watches
    with heartbeat.make_folder() as folder:
        first.beats, first.started = folder, time.monotonic() - 100
        first.while_training()  # none has come yet
        heartbeat.Heart(folder, 0).beat(0)
        first.while_training()
        assert not first.fault


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 20, 0.0), "", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "rank 1 on 127.0.0.2: no",
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "no progress for 62 s",
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "its process has ended", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "rank 0 on 127.0.0.1: no progress for 62 s (launch.stall_timeout_s is 1), in step 7 (its process"
            " has",
        ),
        ({0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)]}, "1 ranks have not started to work"),
    ],
)
def test_who_lags_is_who_gave_the_fewest_signs_of_life(watches, positions, said):
    watches[0]._positions = positions
    assert watches[0]._describe_stall().startswith(said)


@pytest.mark.parametrize(
    ("job", "why", "cause"),
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
def test_what_slurm_does_to_a_job_that_is_asked_to_stop(job, why, cause, monkeypatch):
    monkeypatch.setenv("QWENLORA_LEAD_S", "USR1")  # no number: nothing may be raised
    assert cause_of_stop(job, why) == cause


def test_the_cause_is_noted_at_once_and_asked_for_again_at_the_end(watches, folder, monkeypatch):
    first, _ = watches
    answers = [JobInfo("31", "RUNNING", requeue=True), JobInfo("31", "REQUEUED")]
    monkeypatch.setattr(watching.query, "ask", lambda *_: answers.pop(0))
    first.node.children.stop_requested, first.node.children.stop_signal = True, "SIGTERM"
    first.while_training()
    first.while_training()
    assert len(answers) == 1
    assert first.cause_of_the_end() == "REQUEUED"
    assert folder.history.attempts()[0].cause == "REQUEUED"


# ---- verdicts


def concluded(folder, code, *, children=None, **how):
    console = Console(file=io.StringIO())
    end = conclude(folder, 1, code, children or Children(), console, **how)
    return end, folder.history.attempts()[0]


def write_error(folder, rank, message):
    error = RankError(process=f"rank-{rank}", time=1.0, message=message, code=1, ours=False)
    folder.error(1, error.process).write_text(error.text())


def test_a_fault_that_the_agents_saw_is_the_reason(folder):
    write_error(folder, 1, "reset")
    code, attempt = concluded(folder, 1, fault="node2 is gone", cause="NODE_FAIL")
    assert (code, attempt.reason, attempt.message, attempt.cause) == (
        1,
        "failed",
        "node2 is gone",
        "NODE_FAIL",
    )


def test_a_stop_before_anything_was_saved(folder):
    code, attempt = concluded(folder, -9, children=Children("SIGUSR1"), cause="TIMEOUT")
    assert (code, attempt.reason, attempt.cause) == (75, "stopped", "TIMEOUT")
    assert attempt.message == "SIGUSR1: before it saved anything"


def test_a_run_that_came_to_its_end_was_not_stopped(folder):
    folder.note_attempt(cause="TIMEOUT")
    folder.end_attempt("done")
    code, attempt = concluded(folder, 0, children=Children("SIGUSR1"), cause="TIMEOUT")
    assert (code, attempt.reason, attempt.cause) == (0, "done", None)


def test_a_stop_is_not_a_done_run_though_there_is_an_older_adapter(folder):
    folder.adapter.mkdir()
    assert concluded(folder, 0, children=Children("SIGTERM"))[0] == 75


def test_the_rank_that_torchrun_saw_killed_on_any_node_comes_first(folder):
    report = "(first observed failure):\n  rank      : 3 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
    folder.log(1, "launch-1").write_text(report)
    write_error(folder, 0, "connection reset")
    assert first_error(folder, 1).message.startswith("rank 3 was killed by SIGKILL, not by qwenlora")
