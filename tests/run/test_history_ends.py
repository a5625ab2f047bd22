"""When and how attempts ended, and what that makes of the time they took."""

import fcntl
import threading
from datetime import UTC, datetime, timedelta

import pytest

from qwenlora.run.history import History, ProgressFile, goodput
from qwenlora.run.records import Attempt


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


def at(minute):
    return datetime(2026, 1, 1, 0, minute, tzinfo=UTC)


def test_an_attempt_that_ends_by_itself_ends_now_and_a_killed_one_at_its_last_step(history, monkeypatch):
    started = datetime(2026, 1, 1, tzinfo=UTC)
    clock = {"now": started}
    monkeypatch.setattr("qwenlora.run.history.now", lambda: clock["now"])
    monkeypatch.setattr("qwenlora.run.history.time.time", lambda: clock["now"].timestamp())
    for end in ("stopped", None):
        clock["now"] = started
        number = history.begin(1)
        history.note(first_step=1)
        clock["now"] = started + timedelta(seconds=60)
        history.progress.write(number, 6, trained_s=50.0, saving_s=0.0)
        clock["now"] = started + timedelta(seconds=100)
        if end:
            history.end(end)
    history.begin(1)
    stopped, killed, _ = history.attempts()
    assert (stopped.end - stopped.start).total_seconds() == 100
    assert (killed.end - killed.start).total_seconds() == 60
    assert stopped.goodput == pytest.approx(0.5)


def test_slurms_word_for_what_killed_an_attempt_is_kept(history):
    history.begin(1)
    history.begin(1, killed_by="NODE_FAIL")
    history.begin(1)
    first, second, _ = history.attempts()
    assert (first.reason, first.cause, first.message) == ("killed", "NODE_FAIL", "Slurm: NODE_FAIL")
    assert (second.reason, second.cause, second.message) == ("killed", None, "")


def test_the_end_of_a_run_that_has_no_attempts_is_no_error(history):
    history.end("failed", "the folder was emptied")
    assert history.attempts() == []
    assert (history.last(), history.unfinished) == (None, None)
    history.begin(1)
    assert history.unfinished.attempt == history.last().attempt == 1
    history.end("done")
    assert history.unfinished is None


def test_a_file_system_without_locks_is_written_to_all_the_same(history, monkeypatch):
    def refused(*_):
        raise OSError("no locks here")

    monkeypatch.setattr("qwenlora.run.history.fcntl.flock", refused)
    history.begin(1)
    history.end("done")
    assert [attempt.reason for attempt in history.attempts()] == ["done"]


def test_progress_is_one_line_of_the_same_length_and_may_fail(history, tmp_path):
    history.begin(1)
    sizes = set()
    for step in (1, 10**6):
        history.progress.write(1, step, trained_s=step / 3, saving_s=0.1234567)
        sizes.add(history.progress.path.stat().st_size)
    assert len(sizes) == 1
    assert history.progress.read(1).saving_s == 0.123
    assert history.progress.read(2) is None
    ProgressFile(tmp_path / "no folder" / "progress.json").write(1, 1, 0.0, 0.0)


def test_goodput_counts_neither_refused_attempts_nor_the_one_under_way():
    trained = Attempt(
        attempt=1, start=at(0), end=at(10), reason="done", first_step=1, last_step=9, trained_s=480.0
    )
    refused = Attempt(attempt=2, start=at(10), end=at(50), reason="refused")
    under_way = Attempt(attempt=3, start=at(50))
    assert goodput([trained, refused, under_way]) == pytest.approx(0.8)
    assert goodput([refused, under_way]) is None


def test_what_an_attempt_that_ended_would_be_is_what_it_was(history):
    history.begin(1)
    history.end("stopped", "SIGUSR1")
    before = history.attempts()
    assert history.so_far("failed") == before


def test_the_seconds_since_the_start_are_those_of_the_last_attempt(history, monkeypatch):
    history.begin(1)
    history.begin(1)
    start = history.attempts()[-1].start
    monkeypatch.setattr("qwenlora.run.history.now", lambda: start + timedelta(seconds=90))
    assert history.seconds_since_start() == 90


def test_who_writes_waits_for_who_is_writing(history):
    history.begin(1)
    with history.file.with_name(".attempts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=history.end, args=("done",))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert history.unfinished is not None
    other.join(30)
    assert history.unfinished is None
