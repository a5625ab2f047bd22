"""What an agent watches while its ranks run."""

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
from qwenlora.launch import launcher
from qwenlora.launch import watch as watching
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.meeting import Meeting
from qwenlora.launch.messages import AgentLost, RankPosition, RanksEnded, RunOver
from qwenlora.launch.node import Node
from qwenlora.launch.stalls import SLOWEST_START_S, hosts_behind, is_stalled
from qwenlora.launch.watch import Watch
from qwenlora.run import heartbeat
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import Beat
from qwenlora.slurm.query import JobInfo

HOSTS = ("127.0.0.1", "127.0.0.2")
DISK = "its process waits for a disk or a network file system"


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
    assert first.lost == ["127.0.0.2"]


def test_a_node_that_has_ended_may_leave(watches):
    first, second = watches
    second.node.meeting.send(RanksEnded(code=0))
    time.sleep(0.1)
    second.node.meeting.__exit__()
    time.sleep(0.2)
    first.while_training()
    assert not first.fault
    assert not first.node.children.killed


def test_a_node_whose_ranks_do_not_end_is_let_go(watches, monkeypatch):
    monkeypatch.setattr(watching, "GRACE_S", 0.1)
    first, second = watches
    first.after(1)
    assert first.lost == ["127.0.0.2"]
    assert first.fault == "the agent of 127.0.0.2 does not end its ranks"
    until(lambda: second.while_training() or second.lost == ["127.0.0.1"])
    assert first.node.meeting.connected == set()


@pytest.mark.parametrize("look", [Watch.while_preparing, Watch.while_training])
def test_a_node_that_was_let_go_before_is_no_loss(watches, look):
    """That its connection has ended may be heard in the next attempt."""
    first, _ = watches
    first.node.meeting.inbox.put(AgentLost(node=1))
    first.node.allocation = first.node.allocation.among(["127.0.0.1"])
    look(first)
    assert (first.lost, first.fault, first.node.children.killed) == ([], "", False)


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
        first.ranks_started = second.ranks_started = time.monotonic() - 10
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


def test_ranks_that_never_start_end_the_attempt(watches, monkeypatch):
    monkeypatch.setattr(watching, "STACKS_S", 0.1)
    first, _ = watches
    with heartbeat.make_folder() as folder:
        first.beats, first.ranks_started = folder, time.monotonic() - SLOWEST_START_S - 1
        first._positions = {1: []}
        first.while_training()
    assert first.fault.startswith(
        "2 ranks have not started to work (launch.stall_timeout_s is 1); those that"
    )
    assert first.node.children.killed


def test_a_rank_that_never_comes_to_its_first_step_is_a_stall():
    now = time.monotonic()
    started, long_ago = now - 2 * SLOWEST_START_S, now - SLOWEST_START_S - 1
    beats = [Beat(0, 1, 3, 20, long_ago), Beat(1, 2, 0, 5, long_ago - 60)]
    assert is_stalled(beats, 2, started, 1)
    assert not is_stalled(beats, 2, started, 7200), "a longer limit counts for the start, too"
    assert not is_stalled([beats[0], beats[1]._replace(at=now - 60)], 2, started, 1), (
        "a long start gives signs"
    )


def test_a_long_preparation_is_no_stall_of_the_ranks(watches, monkeypatch):
    first, _ = watches
    first.started = first.ranks_started = time.monotonic() - 2 * SLOWEST_START_S
    monkeypatch.setattr(launcher, "_run_deepspeed", lambda node, watch, *_: watch.while_training() or 1)
    monkeypatch.setattr(Node, "forks_ranks", False)
    monkeypatch.setattr(Watch, "after", lambda *_: None)
    launcher.run_ranks(first.node, first, Handover(1), 0)
    assert not first.fault


def test_a_slow_start_is_no_stall(watches):
    first, _ = watches
    with heartbeat.make_folder() as folder:
        first.beats, first.ranks_started = folder, time.monotonic() - 100
        first.while_training()  # none has come yet
        heartbeat.Heart(folder, 0).beat(0)
        first.while_training()
        assert not first.fault


def test_ranks_of_a_job_that_was_suspended_have_not_stalled(watches, monkeypatch):
    first, _ = watches
    monkeypatch.setattr(watching, "STACKS_S", 0.1)
    now = time.monotonic()
    first._looked = first.ranks_started = now - 100
    monkeypatch.setattr(watching, "read_beats", lambda _: [Beat(0, os.getpid(), 3, 20, now - 99)])
    with heartbeat.make_folder() as first.beats:
        first.while_training()
        assert not first.fault
        first.ranks_started -= 2
        first.while_training()
    assert first.fault, "they have since"


@pytest.mark.parametrize(
    ("positions", "start", "behind"),
    [
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 20, 0.0), "", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "rank 1 on 127.0.0.2: no",
            {"127.0.0.2": False},
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "no progress for 62 s",
            {},
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "its process has ended", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "rank 0 on 127.0.0.1: no progress for 62 s (launch.stall_timeout_s is 1), in step 7 (its process"
            " has",
            {"127.0.0.1": False},
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "its process is stopped", 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "its process is stopped", 62.0)],
            },
            "rank 0 on 127.0.0.1, rank 1 on 127.0.0.2: no progress for 62 s",
            {"127.0.0.1": False, "127.0.0.2": False},
        ),
        (
            {
                0: [RankPosition(Beat(0, 1, 7, 19, 0.0), DISK, 61.0)],
                1: [RankPosition(Beat(1, 2, 7, 19, 0.0), "", 62.0)],
            },
            "rank 0 on 127.0.0.1: no progress for 62 s",
            {"127.0.0.1": True},
        ),
        (
            {0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)]},
            "127.0.0.2: no answer, and no progress of the others' ranks for 61 s (launch.stall_timeout_s is",
            {},
        ),
        (
            {0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)], 1: []},
            "1 ranks have not started to work",
            {"127.0.0.2": False},
        ),
    ],
)
def test_who_lags_is_who_gave_the_fewest_signs_of_life(watches, positions, start, behind):
    watches[0]._positions = positions
    assert watches[0]._describe_stall().startswith(start)
    assert watches[0].behind == behind


def test_a_node_whose_ranks_have_ended_need_not_answer(watches):
    watches[0]._positions, watches[0]._ended = {0: [RankPosition(Beat(0, 1, 7, 19, 0.0), "", 61.0)]}, {1}
    assert "no answer" not in watches[0]._describe_stall()


def test_a_node_waits_for_a_disk_where_none_of_its_ranks_is_stopped():
    states = ((DISK, "its process is stopped"), (DISK, DISK), ("", ""))
    placed = [
        (host, [RankPosition(Beat(0, 1, 7, 19, 0.0), state, 61.0) for state in of_host])
        for host, of_host in zip(("n1", "n2", "n3"), states, strict=True)
    ]
    assert hosts_behind(placed, 2) == {"n1": False, "n2": True}


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
