"""A run's history says of every attempt what became of it, of killed ones too."""

import json
from datetime import UTC, datetime

import pytest

from qwenlora.run.handover import Handover, received
from qwenlora.run.history import History, goodput
from qwenlora.run.records import Attempt


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


def test_attempts_are_numbered_and_keep_how_they_ended(history):
    assert history.begin(2) == 1
    history.note(first_step=1, steps_repeated=0)
    history.progress.write(1, 7, trained_s=3.0, saving_s=0.5)
    history.end("stopped", "SIGUSR1")
    history.end("failed", "too late: the first word stands")
    assert history.begin(4) == 2
    first, second = history.attempts()
    assert (first.reason, first.message, first.last_step, first.processes) == (
        "stopped",
        "SIGUSR1",
        7,
        2,
    )
    assert (first.trained_s, first.saving_s) == (3.0, 0.5)
    assert second.end is None
    assert history.last_step() == 7


def test_an_attempt_that_was_killed_is_closed_by_the_next_with_what_it_left(history):
    history.begin(1)
    history.note(first_step=1)
    history.progress.write(1, 1_000_000, trained_s=1e6, saving_s=0.1)
    history.progress.write(1, 5, trained_s=2.0, saving_s=0.1)
    assert history.last_step() == 5, "of an attempt under way, too"
    history.begin(1)
    killed, _ = history.attempts()
    assert (killed.reason, killed.last_step) == ("killed", 5)
    assert killed.start <= killed.end
    history.begin(1)  # nothing is known of the second: it came to no step
    assert (history.attempts()[1].reason, history.attempts()[1].end) == (
        "killed",
        history.attempts()[1].start,
    )
    assert history.attempts()[1].last_step is None


def test_a_torn_progress_file_says_nothing(history):
    history.begin(1)
    history.progress.path.write_text('{"attempt": 1, "st')
    assert history.last_step() == 0
    history.end("failed", "x")


def line(start, end, first, last, trained_s):
    return Attempt(
        attempt=1,
        start=datetime(2026, 1, 1, 0, start, tzinfo=UTC),
        end=datetime(2026, 1, 1, 0, end, tzinfo=UTC),
        first_step=first,
        last_step=last,
        trained_s=trained_s,
        reason="stopped",
    )


def test_goodput_counts_the_steps_that_were_kept():
    assert goodput([]) is None
    assert goodput([line(0, 10, 1, 100, 480.0)]) == pytest.approx(0.8)
    # of the first attempt's 100 steps the last 50 were trained again
    assert goodput([line(0, 10, 1, 100, 480.0), line(10, 20, 51, 150, 480.0)]) == pytest.approx(
        (240 + 480) / 1200
    )
    # a third that went back before both
    attempts = [line(0, 10, 1, 100, 480.0), line(10, 20, 51, 150, 480.0), line(20, 30, 11, 160, 600.0)]
    assert goodput(attempts) == pytest.approx((48 + 0 + 600) / 1800, abs=1e-4)


def test_the_handover_arrives_as_it_was_sent(monkeypatch):
    sent = Handover(3, "checkpoint-4", ("lora.r", "data"), 1.5)
    for name, value in sent.environment().items():
        monkeypatch.setenv(name, value)
    assert received() == sent
    monkeypatch.delenv("QWENLORA_HANDOVER")
    monkeypatch.setenv("QWENLORA_RESUME", "none")
    assert received() == Handover(resume="none")
    assert not received().by_agent


def test_the_history_is_readable_json_lines(history):
    history.begin(1)
    history.end("failed", "盘满了")
    (text,) = history.file.read_text().splitlines()
    assert "盘满了" in text
    assert json.loads(text)["attempt"] == 1


def test_killed_attempts_in_a_row_are_known_by_their_first_step(history):
    ends = [("stopped", 1), (None, 5), (None, None), (None, 9)]
    for reason, first in ends:
        history.begin(1)
        if first:
            history.note(first_step=first)
        if reason:
            history.end(reason)
    history.begin(1)
    assert history.first_step_of_the_killed() == 5
    history.end("stopped")
    history.begin(1)
    assert history.first_step_of_the_killed() is None
    assert history.so_far("done")[-1].reason == "done"
    assert history.attempts()[-1].reason is None


def test_repeated_steps_are_those_that_it_came_to(history):
    for first, last in ((1, 100), (51, 60), (61, 150)):
        number = history.begin(1)
        history.note(first_step=first)
        history.progress.write(number, last, trained_s=1.0, saving_s=0.0)
        history.end("stopped")
    assert [attempt.steps_repeated for attempt in history.attempts()] == [0, 10, 40]


def test_a_note_on_a_run_that_is_gone_is_no_refusal(history):
    history.note(first_step=1)
    assert history.attempts() == []
