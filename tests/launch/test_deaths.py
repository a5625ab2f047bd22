"""Ranks that a signal ends are seen before their launcher asks after them, and nobody else is."""

import io
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qwenlora.launch.deaths import Deaths
from qwenlora.run import heartbeat
from qwenlora.run.rank_deaths import killed_line

LONG_S = 60.0


@pytest.fixture
def ranks(monkeypatch):
    """Two processes that give signs of life as ranks do, and the folder of those."""
    sleepers = [subprocess.Popen(["sleep", "300"]) for _ in range(2)]
    with heartbeat.make_folder() as folder:
        for rank, process in enumerate(sleepers):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda pid=process.pid: pid)
                heartbeat.Heart(folder, rank).beat(1)
        yield sleepers, folder
    for process in sleepers:
        process.kill()
        process.wait()


def test_the_end_of_a_rank_wakes_who_waits_and_is_told_once(ranks):
    sleepers, folder = ranks
    with Deaths(folder, log := io.BytesIO(), 2) as deaths:
        deaths.pause(0)
        assert not deaths.reports_failure()
        sleepers[1].send_signal(signal.SIGSEGV)
        start = time.monotonic()
        deaths.pause(LONG_S)
        assert time.monotonic() - start < LONG_S / 2, "it was woken"
        assert deaths.reports_failure()
        assert not deaths.reports_failure()
        sleepers[0].kill()
        deaths.pause(LONG_S)
        assert not deaths.reports_failure(), "the first one is why the others end"
    assert log.getvalue().decode() == killed_line("rank-1", signal.SIGSEGV)


def test_a_rank_that_leaves_was_not_killed(monkeypatch):
    leaver = subprocess.Popen(["sh", "-c", "read _; exit 3"], stdin=subprocess.PIPE)
    with heartbeat.make_folder() as folder, Deaths(folder, log := io.BytesIO(), 1) as deaths:
        monkeypatch.setattr(os, "getpid", lambda: leaver.pid)
        heartbeat.Heart(folder, 0).beat(1)
        leaver.stdin.close()
        deaths.pause(LONG_S)
        assert not deaths.reports_failure()
        assert leaver.wait() == 3
    assert log.getvalue() == b""


@pytest.mark.parametrize(
    ("code", "line"), [(247, killed_line("rank-1", 9)), (1, ""), (75, ""), (-9, ""), (0, "")]
)
def test_the_launchers_exit_code_tells_of_an_only_rank(ranks, code, line):
    folder = ranks[1]
    Path(folder, "0").unlink()
    with Deaths(folder, log := io.BytesIO(), 1) as deaths:
        deaths.report_exit_code(code)
    assert log.getvalue().decode() == line


def test_the_launchers_exit_code_does_not_tell_which_of_two(ranks):
    with Deaths(ranks[1], log := io.BytesIO(), 2) as deaths:
        deaths.report_exit_code(247)
    assert log.getvalue() == b""


def test_on_a_kernel_without_pidfd_it_waits_as_long_as_it_was_told(ranks, monkeypatch):
    def missing(pid):
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", missing)
    sleepers, folder = ranks
    with Deaths(folder, log := io.BytesIO(), 2) as deaths:
        sleepers[0].kill()
        start = time.monotonic()
        deaths.pause(0.5)
        assert time.monotonic() - start >= 0.5
        assert deaths.reports_failure()
    assert log.getvalue().decode() == killed_line("rank-0", 9)
