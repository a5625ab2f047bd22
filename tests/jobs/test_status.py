"""`qwenlora status` tells from files alone how a run stands."""

import io
import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from qwenlora.jobs import ledger
from qwenlora.jobs.find import find
from qwenlora.jobs.task import summary
from qwenlora.jobs.views.diff import results
from qwenlora.jobs.views.overview import read_overview
from qwenlora.jobs.views.status import show_status
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Attempt, Paces, now
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "my")


def shown(run) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_status(find(str(run.path)), console)
    return console.file.getvalue()


def held_by(run, pid: int) -> None:
    (run.path / ".lock").write_text(f"process {pid} on {socket.gethostname()}")


def test_a_run_under_way_a_killed_one_and_a_done_one_are_told_apart(run):
    run.path.mkdir()
    run.begin_attempt(2)
    run.history.note(
        first_step=1, resumed_from=None, steps_repeated=0, seconds={"start_up": 2.0, "data": 3.0}
    )
    run.history.progress.write(1, 7, 5.0, 0.1)
    run.metrics.write_text(json.dumps({"step": 6, "loss": 1.25}) + "\n" + '{"step": 7, "lo')
    held_by(run, os.getpid())
    assert "my: running · step 7, 0 s ago · loss 1.2500 at step 6 · no checkpoint" in shown(run)
    held_by(run, 2**22 - 1)  # no such process
    assert "my: killed · step 7" in shown(run)
    run.begin_attempt(2)
    run.checkpoint(7).mkdir()
    run.history.note(
        first_step=8, resumed_from="checkpoint-7", steps_repeated=0, seconds={"start_up": 2.0, "data": 3.5}
    )
    run.history.progress.write(2, 9, 5.0, 0.1)
    run.end_attempt("done")
    run.begin_attempt(2)
    run.end_attempt(
        "refused", "train.max_steps=3 is less than the 9 steps that checkpoint-9 has trained " + "x" * 200
    )
    text = shown(run)
    assert "my: done · step 9 · loss 1.2500 at step 6 · 1 checkpoint, newest checkpoint-7 · goodput " in text
    rows = [line for line in text.splitlines() if line[:2] in ("1 ", "2 ", "3 ")]
    assert [row.split()[-1] for row in rows] == ["killed", "done", "refused"]
    assert "7  8-9        0    5.5 s  done" in rows[1]
    assert "attempt 3 refused: train.max_steps=3 is less than" in text


def test_slow_ranks_are_named(run):
    run.path.mkdir()
    run.begin_attempt(2)
    assert "slow" not in shown(run)
    run.paces.write_text(
        Paces(step=9, hosts=["a", "b"], seconds=[1.0, 2.0], slow=["rank 1 on b is slow"]).text()
    )
    assert "rank 1 on b is slow" in shown(run)


def test_bad_nodes_are_named_with_the_reason(run):
    run.path.mkdir()
    run.begin_attempt(2)
    run.note_attempt(bad=["node3"])
    run.end_attempt("failed")
    entries = BadNodes.beside(run)
    entries.add("stalled", "node3", "rank 5 hung", run, 1)
    entries.add("failed", "node4", "once", run, 1)
    text = shown(run)
    assert "bad: node3: rank 5 hung (0 s ago, attempt 1 of my)" in text
    assert "node4" not in text
    assert " failed  bad node3" in text


def test_restarts_inside_a_job_are_shown_with_what_was_lost_and_the_time_they_took(run):
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def attempt(number, begins, ends, reason, **values):
        times = {"start": start + timedelta(seconds=begins), "end": start + timedelta(seconds=ends)}
        return Attempt(attempt=number, job_id="7", reason=reason, **times, **values)

    attempts = [
        attempt(1, 0, 100, "failed", lost=["node3", "node9"]),
        attempt(2, 101, 200, "failed", seconds={"model": 2.5}),
        attempt(3, 200, 300, "killed", cause="NODE_FAIL", lost=["node4"]),
        attempt(4, 900, 1000, "done", restarts=1, seconds={"model": 2.5}),
    ]
    run.path.mkdir()
    run.history.file.write_text("".join(f"{one.text(None)}\n" for one in attempts))
    text = shown(run)
    assert "went on inside the job 2 times; until the first step: 3.5 s, -" in text
    rows = [
        line.rstrip().split("  ")[-1].strip()
        for line in text.splitlines()
        if line[:2] in ("1 ", "2 ", "3 ", "4 ")
    ]
    assert rows == ["lost node3, node9", "-", "NODE_FAIL", "-"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: it has no attempts\.jsonl; name a run folder"):
        find(str(tmp_path))


def test_a_run_whose_job_is_pending_waits_to_go_on_in_every_view(run, monkeypatch):
    run.path.mkdir()
    run.begin_attempt(1, job_id="7")
    run.end_attempt("stopped")
    monkeypatch.setattr(query, "ask", {"7": JobInfo("7", "PENDING")}.get)
    assert shown(run).startswith("my: waits to go on · step 0")
    overview = read_overview(run)
    assert overview.state == results(overview)["state"] == "waits to go on"
    monkeypatch.setattr(query, "ask", {"7": JobInfo("7", "COMPLETED")}.get)
    assert shown(run).startswith("my: stopped · step 0")
    assert read_overview(run).state == summary(run)["state"] == "stopped"


def test_a_run_of_a_sweep_that_is_to_go_on_says_so(run, monkeypatch):
    member = RunFolder(run.path / "lora.r=8")
    ledger.note(member, ledger.SubmittedJob(job_id="7_0", time=now(), cluster="slurm"))
    member.path.mkdir(parents=True)
    member.begin_attempt(1)
    member.end_attempt("failed")
    monkeypatch.setattr(query, "ask", {"7_0": JobInfo("7_0", "PENDING")}.get)
    assert shown(run).startswith("lora.r=8: waits to go on · ")


def test_an_attempt_elsewhere_is_running_until_it_was_silent_for_an_hour(run):
    run.path.mkdir()
    run.begin_attempt(1)
    (run.path / ".lock").write_text("process 1 on elsewhere")
    assert shown(run).startswith("my: running · ")
    for file in (run.history.file, run.history.progress.path):
        if file.exists():
            os.utime(file, (time.time() - 3601,) * 2)
    assert shown(run).startswith("my: unknown · ")


def test_the_goodput_shown_leaves_refused_attempts_out(run):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    trained = Attempt(
        attempt=1,
        start=start,
        end=start + timedelta(seconds=100),
        reason="done",
        first_step=1,
        last_step=5,
        trained_s=80.0,
    )
    refused = Attempt(attempt=2, start=start, end=start + timedelta(seconds=100), reason="refused")
    run.path.mkdir()
    run.history.file.write_text(f"{trained.text(None)}\n{refused.text(None)}\n")
    assert "goodput 80%" in shown(run)
    assert results(read_overview(run))["goodput"] == "80%"
