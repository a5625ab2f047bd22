"""Long work shows how far it is: by a bar on a terminal, by a line from time to time in a log."""

import io
import sys

import pytest
from rich.console import Console

from qwenlora.run import long_work
from qwenlora.run.long_work import LongWork, each


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lines_of(work_for, console=None):
    """Return the lines of ten parts, each of which takes some seconds."""
    clock = Clock()
    with LongWork(console=console, get_time=clock) as work:
        task = work.add_task("base: training questions", total=10)
        for part in range(10):
            clock.now += work_for
            if part % 2:
                work.advance(task)
            else:
                work.update(task, completed=part + 1)


def log():
    return Console(file=io.StringIO(), markup=False, highlight=False)


def test_a_log_gets_a_line_every_half_a_minute():
    console = log()
    lines_of(20, console)
    assert console.file.getvalue().splitlines() == [
        "base: training questions: 20%, about 2 min 40 s left",
        "base: training questions: 40%, about 2 min 0 s left",
        "base: training questions: 60%, about 1 min 20 s left",
        "base: training questions: 80%, about 40 s left",
        "base: training questions: 100%, about 0 s left",
    ]


def test_short_work_says_nothing():
    console = log()
    lines_of(2.9, console)
    assert console.file.getvalue() == ""


def test_lines_go_to_standard_error_since_answers_may_go_to_a_file(capsys):
    lines_of(300)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[0] == "base: training questions: 10%, about 45 min 0 s left"


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80)
    lines_of(300, console)
    assert "━" in terminal.getvalue()
    assert "left" not in terminal.getvalue()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert not LongWork().disable


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_each_item_is_counted_when_it_is_done(monkeypatch, items):
    done = []
    monkeypatch.setattr(long_work.LongWork, "_say", lambda work, task: done.append(work.tasks[0].completed))
    assert list(each(items, "x")) == items
    assert done == items


def test_no_bytes_to_read_are_no_line():
    console, clock = log(), Clock()
    with LongWork(console=console, get_time=clock) as work:
        task = work.add_task("preparing data", total=None)
        clock.now += 100
        work.update(task, completed=5)
    assert console.file.getvalue() == ""
