"""`qwenlora status` tells from files alone how a run stands."""

import io
import json
import os
import socket

import pytest
from rich.console import Console

from qwenlora.jobs.find import find
from qwenlora.jobs.views.status import show_status
from qwenlora.run.folder import RunFolder


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


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: it has no attempts\.jsonl; name a run folder"):
        find(str(tmp_path))
