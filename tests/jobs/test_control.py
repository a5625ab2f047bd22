"""A run or a job is found by what a user calls it, and shown, followed, cancelled and resumed by that."""

import contextlib
import io
import json
import os
import subprocess
import time

import forked
import pytest
from rich.console import Console

from qwenlora.jobs import submit
from qwenlora.jobs.cancel import cancel
from qwenlora.jobs.find import find
from qwenlora.jobs.submission.resume import resume
from qwenlora.jobs.views.status import show_status
from qwenlora.run.folder import RunFolder
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo

CONFIG = """
model: {name_or_path: tiny}
data: {train: example}
train: {max_steps: 20000, save_strategy: 'no', global_batch_size: 2}
log: {wandb: off, logging_steps: 1}
launch: {preflight: off}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def slurm(monkeypatch):
    """Return the jobs that Slurm knows, by id."""
    jobs: dict[str, JobInfo] = {}
    monkeypatch.setattr(query, "ask", jobs.get)
    return jobs


@pytest.fixture
def submitted(folder):
    def submitted(run: str, job_id: str, **facts) -> RunFolder:
        folder = RunFolder(run)
        folder.submitted.mkdir(parents=True, exist_ok=True)
        line = {"job_id": job_id, "time": "2026-01-01T00:00:00.000+00:00", "cluster": "slurm"}
        line |= {"folder": str(folder.submitted / "1"), "work_dir": os.getcwd(), "config": "c.yaml"}  # noqa: PTH109
        with (folder.submitted / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(line | facts) + "\n")
        return folder

    return submitted


def shown(named: str) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_status(find(named), console)
    return console.file.getvalue()


def test_a_run_that_waits_is_shown_as_slurm_shows_it(slurm, submitted):
    submitted("runs/my", "12")
    slurm["12"] = JobInfo("12", "PENDING", reason="Priority")
    assert shown("runs/my") == "job 12: PENDING · waits: Priority\n"
    slurm["12"] = JobInfo("12", "RUNNING", seconds_left=3723.4, nodes=("a1", "a2"), restarts=2)
    assert shown("12") == "job 12: RUNNING · 1:02:03 left of its time · on a1, a2 · started again 2 times\n"
    del slurm["12"]
    assert shown("runs/my") == "job 12: Slurm does not know it any more\n"


def test_a_job_s_run_is_found_here_or_where_slurm_says_it_was_submitted(
    slurm, submitted, folder, monkeypatch
):
    submitted("runs/my", "12")
    submitted("runs/sweep/lora.r=1", "13_0")
    submitted("runs/sweep/lora.r=2", "13_1")
    submitted("runs/sweep", "13", runs=2)
    assert find("12").run.path == folder / "runs/my"
    assert find("13_1").run.path == folder / "runs/sweep/lora.r=2"
    assert [run.path.name for run in find("13").sweep] == ["lora.r=1", "lora.r=2"]
    slurm["14"] = JobInfo("13_1", "RUNNING")  # its raw number
    assert find("14").run.path == folder / "runs/sweep/lora.r=2"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(ValueError, match="job 12 is known neither to Slurm nor to a run below"):
        find("12")
    slurm["12"] = JobInfo("12", "RUNNING", work_dir=folder)
    assert find("12").run.path == folder / "runs/my"


def test_a_sweep_is_a_line_a_run(slurm, submitted, folder):
    submitted("runs/sweep/lora.r=1", "13_0")
    done = submitted("runs/sweep/lora.r=2", "13_1")
    done.path.mkdir()
    done.begin_attempt(1)
    done.end_attempt("done")
    slurm["13_0"] = JobInfo("13_0", "PENDING")
    assert shown("runs/sweep").splitlines() == [
        "lora.r=1: job 13_0: PENDING",
        "lora.r=2: done · step 0 · no checkpoint · goodput 0%",
    ]
    with pytest.raises(ValueError, match=r"holds 2 runs; name one to see its log, such as .*lora\.r=1"):
        find("runs/sweep").only_run("see its log")


def test_what_ended_an_attempt_is_a_column(slurm, submitted):
    run = submitted("runs/my", "12")
    run.path.mkdir()
    run.begin_attempt(1)
    run.begin_attempt(1, killed_by="NODE_FAIL")
    assert [line.split()[-1] for line in shown("runs/my").splitlines()[2:5]] == ["cause", "NODE_FAIL", "-"]


def test_a_job_that_slurm_alone_knows_is_shown_and_no_more(slurm):
    slurm["7"] = JobInfo("7", "PENDING")
    assert shown("7") == "job 7: PENDING\n"
    with pytest.raises(ValueError, match="job 7: its run folder is not known here; name the run folder"):
        find("7").only_run("resume")


def test_what_is_neither_is_refused(slurm, folder):
    (folder / "runs").mkdir()
    with pytest.raises(ValueError, match=r"holds no run: .* or a job"):
        find("runs")


def test_a_run_that_is_not_running_cannot_be_cancelled_and_one_that_is_not_resumed(slurm, submitted):
    submitted("runs/my", "12")
    with pytest.raises(ValueError, match="is not running on this machine, nor as a job that Slurm knows"):
        cancel(find("runs/my"), now=False)
    slurm["12"] = JobInfo("12", "RUNNING")
    with pytest.raises(ValueError, match="job 12 is RUNNING already"):
        resume(find("runs/my"))


def test_a_run_that_nobody_submitted_is_resumed_by_the_command_that_is_said(slurm, folder):
    run = RunFolder("runs/my run")
    run.path.mkdir(parents=True)
    run.begin_attempt(1)
    with pytest.raises(ValueError, match="is running already"):
        resume(find("runs/my run"))
    run.end_attempt("failed")
    with pytest.raises(ValueError, match=f"goes on with it: qwenlora train '{run.config}'"):
        resume(find("runs/my run"))
    run.config.write_text("{run_dir: runs/my run, model: {name_or_path: qwen}, data: {train: rows.jsonl}}")
    with (
        contextlib.chdir("runs"),
        pytest.raises(ValueError, match=f"goes on with it: cd {folder} && qwenlora train '{run.config}'"),
    ):
        resume(find("my run"))


@pytest.mark.slow
def test_a_local_job_is_followed_cancelled_and_resumed(folder, qwenlora):
    """logs -f ends by itself with the run."""
    job, run = submit("my.yaml", cluster="local"), RunFolder("runs/my")
    command = [*forked.COMMAND, "logs", "-f", "runs/my"]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        _wait_for(lambda: run.history.attempts() and _step(run, 1) >= 3)
        assert "is asked to save and to stop" in qwenlora("cancel", "runs/my").stdout
        assert job.result()["reason"] == "stopped"
        said = following.communicate(timeout=500)[0]
    assert "\nsteps         20,000 " in said
    assert said.rstrip().endswith("Exiting after successful completion")
    assert qwenlora("logs", "runs/my", "--rank", 0).stdout == run.log(1, "rank-0").read_text()
    answer = qwenlora("resume", "runs/my")
    assert answer.stdout.startswith("job "), answer.stderr
    _wait_for(lambda: len(run.history.attempts()) == 2 and _step(run, 2) >= 1)
    assert run.history.attempts()[1].first_step > 1
    assert "is killed" in qwenlora("cancel", "runs/my", "--now").stdout
    _wait_for(lambda: run.abandoned)
    assert "not running on this machine" in qwenlora("cancel", "runs/my").stderr


def _step(run: RunFolder, attempt: int) -> int:
    progress = run.history.progress.read(attempt)
    return progress.step if progress else 0


def _wait_for(what, seconds: float = 240):  # two other ranks may be starting beside
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
