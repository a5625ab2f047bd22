"""`qwenlora watch` shows runs as they are, in 80 columns, without colours, and asks before it stops one."""

import asyncio
import json
import os
import socket
from datetime import timedelta

import pytest
from rich.style import Style

from qwenlora.cli import main as cli
from qwenlora.jobs.views.watch import WatchApp
from qwenlora.jobs.views.watched import Watching, read_watched, sparkline
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import now
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo


def train(run: RunFolder, step: int, **facts: object) -> None:
    """Make a run look as one that trains, one second a step."""
    run.history.begin(1, start=now() - timedelta(seconds=2 * step))
    run.history.note(first_step=1, **facts)
    run.history.progress.write(1, step, float(step), 0.1)
    (run.path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    lines = [
        {"step": at, "loss": 4.0 - at * 0.125, "tokens_per_s": 9876.5, "mfu": 0.417}
        for at in range(1, step + 1)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def running(make):
    run = make("running", "train.max_steps=100")
    run.history.file.unlink()
    train(run, 20)
    return run


def text_of(app: WatchApp) -> str:
    """Return what is on the screen."""
    width, height = app.size
    strips = app.screen._compositor.render_strips()
    lines = ["".join(segment.text for segment in strip).rstrip() for strip in strips]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    return "\n".join(lines)


def watched(runs, *steps, size=(80, 24)) -> list[str]:
    """Return the screen at first and after each step: keys, or a function."""

    async def use() -> list[str]:
        watching = Watching()
        app = WatchApp(lambda: watching.read(runs), "runs")
        screens = []
        async with app.run_test(size=size) as pilot:
            for step in [None, *steps]:
                if callable(step):
                    step()
                elif step:
                    await pilot.press(*step.split())
                await app.workers.wait_for_complete()
                app.reload()
                await app.workers.wait_for_complete()
                await pilot.pause()
                screens.append(text_of(app))
        return screens

    return asyncio.run(use())


def line_of(screen: str, name: str) -> list[str]:
    """Return the words of a run's line in the table."""
    return next(line.split() for line in screen.splitlines() if line.split()[:1] == [name])


def test_runs_under_way_come_first_with_their_numbers(make, running):
    done = make("done", loss=0.25)
    (screen,) = watched([done, running])
    assert "2 runs · 1 running" in screen.splitlines()[0]
    bars = sparkline([4.0 - at * 0.125 for at in range(1, 21)], 10)
    assert line_of(screen, "running") == ["running", "running", "20/100", "1.5", bars, "9,876", "0:01:20"]
    assert line_of(screen, "done")[:2] == ["done", "done"]
    assert screen.index("running  ") < screen.index("done  ")
    words = " ".join(screen.split())
    assert "running: running · step 20, " in words
    assert "loss 1.5000 at step 20 · no checkpoint" in words
    assert "1 attempt · tokens/s 9,876 · MFU 42% · left 0:01:20" in words


def test_a_wide_screen_has_more_columns(running):
    wide = watched([running], size=(140, 30))[0]
    assert all(title in wide for title in ("MFU", "attempts", "goodput", "causes", "waits for"))
    assert "goodput" not in watched([running])[0].split("\n")[1]


def test_numbers_follow_the_files(running):
    def more() -> None:
        with running.metrics.open("a") as file:
            file.write(json.dumps({"step": 21, "loss": 0.5}) + "\n")
        running.history.progress.write(1, 21, 21.0, 0.1)

    before, after = watched([running], more)
    assert (line_of(before, "running")[2:4], line_of(after, "running")[2:4]) == (
        ["20/100", "1.5"],
        ["21/100", "0.5"],
    )


def test_why_a_job_waits_and_what_ended_it_before_is_shown(make, running, monkeypatch):
    job = JobInfo("7", "PENDING", reason="Priority", restarts=1)
    monkeypatch.setattr(query, "ask", lambda job_id: job)
    running.history.note(job_id="7", cause="NODE_FAIL")
    running.history.end("failed", "Slurm: NODE_FAIL")
    narrow = watched([running])[0]
    assert "waits to go on" in narrow
    assert "job 7: PENDING · waits: Priority" in narrow
    assert "ended by Slurm NODE_FAIL" in narrow
    assert line_of(watched([running], size=(150, 30))[0], "running")[-2:] == ["NODE_FAIL", "Priority"]


def test_a_run_is_opened_and_its_log_is_followed(running):
    log = running.log(1, "rank-0")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"first line\n\x1b[31mred\x1b[0m\n")

    def more() -> None:
        with log.open("ab") as file:
            file.write(b"half")

    one, logged, _, back = watched([running], "enter", "l", more, "escape")[1:]
    assert "loss, steps 1 to 20" in one
    assert "start (UTC)" in one
    assert "first line" in logged
    assert "red" in logged
    assert "[31m" not in logged
    assert "loss, steps 1 to 20" in back


@pytest.mark.parametrize("width", [80, 140])
def test_cancel_asks_first(running, width, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    asked, refused = watched([running], "c", "n", size=(width, 24))[1:]
    assert "Cancel running?" in asked
    assert (killed, "Cancel" in refused) == ([], False)
    said = watched([running], "c", "y", size=(width, 24))[-1]
    assert [pid for pid, _ in killed] == [os.getpid()]
    assert "is asked to save and to stop" in said


def test_what_cannot_be_resumed_says_how_it_goes_on(make):
    run = make("over")
    run.history.file.unlink()
    run.begin_attempt(1)
    run.end_attempt("stopped")
    said = watched([run], "r", "y", size=(120, 24))[-1]
    assert "was not submitted from here; this goes on with it:" in " ".join(said.split())


def test_without_colours_nothing_is_lost(running, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    async def use() -> list[Style]:
        app = WatchApp(lambda: [read_watched(running)], "runs")
        async with app.run_test() as pilot:
            await app.workers.wait_for_complete()
            await pilot.pause()
            strips = app.screen._compositor.render_strips()
            return [segment.style for strip in strips for segment in strip if "running" in segment.text]

    styles = asyncio.run(use())
    colours = [colour for style in styles for colour in (style.color, style.bgcolor)]
    assert all(colour is None or colour.is_default for colour in colours)
    assert any(style.reverse for style in styles), "the cursor is seen"


def test_an_empty_folder_says_what_to_do():
    assert "no runs yet; `qwenlora train my.yaml` makes one" in watched([])[0]


def test_the_screen_and_the_list_have_one_state_of_a_run(make, running):
    for run in (make("done"), running):
        seen = read_watched(run)
        assert seen.state == seen.overview.state


def test_a_sparkline_shows_the_course_and_leaves_out_what_is_not_finite():
    assert sparkline([3, 2, 1, 0], 4) == "█▆▃▁"
    assert sparkline([float("nan"), 1, float("inf"), 2], 4) == "▁█"
    assert len(sparkline(range(1000), 10)) == 10
    assert sparkline([], 5) == ""


def test_where_there_is_no_terminal_one_line_says_what_to_use(capsys):
    with pytest.raises(SystemExit) as left:
        cli.app(["watch"])
    line = "error: watch needs a terminal; use qwenlora runs DIR, or qwenlora status RUN\n"
    assert (left.value.code, capsys.readouterr().err) == (2, line)


def test_the_cursor_stays_on_its_run(make, running):
    """Also when another run comes above it."""
    runs = [make("done"), make("other")]
    before, after = watched(runs, "down", lambda: runs.insert(0, running))[1:]
    below = [screen.splitlines()[-4:] for screen in (before, after)]
    assert below[0] == below[1]
    assert line_of(after, "running")


def test_a_job_that_slurm_requeues_is_seen_though_no_file_changes(running, monkeypatch):
    state, watching = ["COMPLETED"], Watching()
    monkeypatch.setattr(query, "ask", lambda job_id: JobInfo("7", state[0]))
    running.history.note(job_id="7")
    running.history.end("stopped")
    assert watching.read([running])[0].state == "stopped"
    state[0] = "PENDING"
    assert watching.read([running])[0].state == "waits to go on"


def test_a_run_that_is_done_is_read_again_only_when_its_files_changed(make):
    run, watching = make("done"), Watching()
    first = watching.read([run])[0]
    assert watching.read([RunFolder(run.path)])[0] is first
    os.utime(run.metrics, (1, 1))
    assert watching.read([run])[0] is not first
