"""`qwenlora runs` lists what there is, in whatever state, and says what is wrong without falling over it."""

import io
import os
import socket

import pytest
from rich.console import Console

from qwenlora.jobs import ledger
from qwenlora.jobs.views.overview import read_overview
from qwenlora.jobs.views.runs import show_runs
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import now
from qwenlora.slurm import query


@pytest.fixture
def listed(tmp_path):
    """Return what prints the runs below a folder, and returns that."""

    def listed(folder="runs", width=80) -> str:
        console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
        assert show_runs(tmp_path / folder, console) == 0
        return console.file.getvalue()

    return listed


def rows(text: str) -> list[list[str]]:
    """Return the words of each line of the first table."""
    return [line.split() for line in text.split("\n\n")[0].splitlines()[1:]]


def test_runs_are_listed_with_how_far_they_are_the_newest_last(make, listed):
    make("a")
    make("b", "lora.r=8", loss=0.125, evaluated=None, step=7)
    text = listed()
    assert rows(text) == [
        ["a", "done", "40", "0.25", "1.5", "1,200", "2.5", "MB", "0", "s"],
        ["b", "done", "7", "0.125", "-", "1,200", "2.5", "MB", "0", "s"],
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_what_all_have_is_said_once_and_what_differs_by_run(make, listed):
    make("a")
    more = ["data.roles={bot: user}", "log.wandb=off"]
    make("b", "lora.r=8", "data.train=[{path: other.jsonl, weight: 2}, more.jsonl]", *more)
    text = listed(width=200)
    assert "all 2: model.name_or_path=tiny  train.learning_rate=0.0002" in text
    last = [line.rstrip().split(maxsplit=1) for line in text.splitlines()[-2:]]
    assert last == [
        ["a", "data.train=rows/my.jsonl  lora.r=16"],
        [
            "b",
            "data.train=[{path: other.jsonl, weight: 2.0}, more.jsonl]  data.roles={bot: user}  lora.r=8",
        ],
    ]
    assert "wandb" not in text  # how a run is watched makes no version of it


def test_runs_of_sweeps_waiting_ones_and_ones_set_aside_are_found(make, listed, tmp_path):
    make("sweep/lora.r=8")
    make("a").path.rename(tmp_path / "runs" / "a.old-1")
    make("a")
    job = ledger.SubmittedJob(job_id="7", time=now(), cluster="slurm")
    ledger.note(RunFolder(tmp_path / "runs" / "soon"), job)
    ledger.note(RunFolder(tmp_path / "runs" / "sweep"), job.revised(job_id="8", runs=1))
    ledger.note(RunFolder(tmp_path / "runs" / "sweep" / "lora.r=8"), job.revised(job_id="8_0"))
    text = listed()
    assert {row[0] for row in rows(text)} == {"sweep/lora.r=8", "a.old-1", "a", "soon"}
    assert "a.old-1: set aside by --fresh" in text
    assert next(row for row in rows(text) if row[0] == "soon")[1:3] == ["not", "started"]
    assert {row[0] for row in rows(listed("."))} == {
        "runs/sweep/lora.r=8",
        "runs/a.old-1",
        "runs/a",
        "runs/soon",
    }
    assert [row[0] for row in rows(listed("runs/a"))] == ["a"]


def test_a_run_under_way_a_killed_one_and_a_stopped_one_are_told_apart(make):
    run = make("a")
    run.begin_attempt(1)
    (run.path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    assert read_overview(run).state == "running"
    (run.path / ".lock").write_text(f"process {2**22 - 1} on {socket.gethostname()}")  # no such process
    assert read_overview(run).state == "killed"
    run.end_attempt("stopped")
    assert read_overview(run).state == "stopped"
    run.begin_attempt(1)
    run.end_attempt("refused", "another config")
    assert read_overview(run).state == "stopped"  # what was refused changed nothing


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "lora: [", "config.yaml cannot be read"),
        (
            "config.yaml",
            "model: {name_or_path: tiny}\ndata: {train: x}\nlora: {rank: 8}",
            "did you mean lora.r?",
        ),
        ("facts.json", '{"data": ', "facts.json cannot be read"),
        ("facts.json", "[1]", "facts.json cannot be read: Input should be an object"),
        (
            "facts.json",
            '{"data": {"train": []}, "packing": "x"}',
            "facts.json cannot be read: base: Field required",
        ),
        ("code.json", "\ud800", "code.json cannot be read"),
        ("attempts.jsonl", '{"attempt": 1}\n', "attempts.jsonl cannot be read"),
        ("attempts.jsonl", '{"attempt": 1, "start": "yesterday"}\n', "attempts.jsonl cannot be read"),
        ("comparison.json", "{", "comparison.json cannot be read"),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_listed(make, listed, name, content, said):
    make("whole")
    damaged = make("damaged")
    (damaged.path / name).write_text(content, errors="surrogatepass")
    text = listed(width=300)
    assert {row[0] for row in rows(text)} == {"whole", "damaged"}
    assert said in text
    assert "damaged: " in text


def test_half_a_line_of_metrics_is_passed_over(make):
    run = make("a")
    with run.metrics.open("a") as file:
        file.write('{"step": 41, "loss": "\n{"step": 41, "eval_loss"')
    version = read_overview(run)
    assert (version.loss["loss"], version.evaluated["eval_loss"]) == (0.25, 1.5)
    assert not version.flaws


def test_a_name_cannot_command_the_terminal(make, listed):
    make("a\x1b[31m\nb")
    text = listed()
    assert "\x1b" not in text
    assert "a\ufffd[31m\ufffdb" in text


def test_no_folder_and_an_empty_one_say_what_to_do(tmp_path, listed):
    with pytest.raises(ValueError, match="there is no folder .*name the one that holds your run folders"):
        listed("nowhere")
    (tmp_path / "empty").mkdir()
    assert "no runs in" in listed("empty")
    assert "makes one" in listed("empty")


def test_slurm_is_not_asked_about_runs_that_are_done(make, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    run = make("one")
    monkeypatch.setattr(query, "ask", lambda job_id: pytest.fail("Slurm was asked"))
    assert read_overview(run).state == "done"
