"""How the end of an attempt is recorded, explained and turned into an exit code."""

import io
import signal

import pytest
from rich.console import Console

from qwenlora.launch.verdict import conclude, first_error
from qwenlora.run.folder import RunFolder
from qwenlora.run.rank_deaths import killed_line
from qwenlora.run.records import RankError


class Children:
    def __init__(self, stop_signal=""):
        self.stop_requested, self.stop_signal = bool(stop_signal), stop_signal


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.begin_attempt(2)
    return folder


def concluded(folder, code, *, children=None, **how):
    console = Console(file=io.StringIO())
    end = conclude(folder, 1, code, children or Children(), console, **how)
    return end, folder.history.attempts()[0]


def write_error(folder, rank, message):
    error = RankError(process=f"rank-{rank}", time=1.0 + rank, message=message, code=1, ours=False)
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


def test_a_rank_that_was_killed_on_any_node_comes_first(folder):
    folder.log(1, "launch-1").write_text(f"a library's line\n{killed_line('rank-3', signal.SIGKILL)}")
    write_error(folder, 0, "connection reset")
    assert first_error(folder, 1).message.startswith("rank 3 was killed by SIGKILL, not by qwenlora")


@pytest.mark.parametrize(
    ("errors", "number", "first"),
    [
        ({}, signal.SIGKILL, "rank 3 was killed by SIGKILL"),
        ({0: "reset"}, signal.SIGSEGV, "rank 3 was killed by SIGSEGV"),
        ({0: "reset"}, signal.SIGTERM, "reset"),  # a launcher ends the other ranks by SIGTERM
        ({0: "reset", 3: "out of memory"}, signal.SIGKILL, "reset"),  # it wrote its error before
    ],
)
def test_who_failed_first(folder, errors, number, first):
    for rank, message in errors.items():
        write_error(folder, rank, message)
    folder.log(1, "launch").write_text(killed_line("rank-3", number))
    assert first_error(folder, 1).message.startswith(first)


def test_a_rank_that_sigterm_ended_is_no_error(folder):
    folder.log(1, "launch").write_text(killed_line("rank-3", signal.SIGTERM))
    assert first_error(folder, 1) is None


def test_a_preparation_that_was_killed_says_so(folder):
    folder.log(1, "launch").write_text(killed_line("prepare", signal.SIGKILL))
    assert first_error(folder, 1).message.startswith("the preparation was killed by SIGKILL, not by qwenlora")
