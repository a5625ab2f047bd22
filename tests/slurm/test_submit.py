"""Jobs that Python submits, on a real Slurm: results, states, arrays, and coming back."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from qwenlora.jobs import submit, submit_sweep
from qwenlora.jobs.cancel import cancel
from qwenlora.jobs.find import find
from qwenlora.jobs.submission.resume import resume
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Attempt

CONFIG = """
model: {name_or_path: tiny}
data: {train: example}
train: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 4,
        save_strategy: steps, save_steps: 2}
log: {wandb: off, logging_steps: 1}
launch: {preflight: off}
"""


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    (tmp_path / "my.yaml").write_text(CONFIG)
    yield tmp_path
    cluster.wait_idle()


def wait_for(what, seconds: float = 900):
    """Return what() as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


def result(job, seconds: float = 900) -> dict:
    """Return job.result(), which by itself would wait as long as Slurm takes to say that a job failed."""
    wait_for(lambda: job.done(force_check=True), seconds)
    return job.result()


def state(job) -> str:
    return job.get_info(mode="force").get("State", "")


def attempts(run: str) -> list[Attempt]:
    return RunFolder(run).history.attempts()


def step(run: RunFolder, attempt: int) -> int:
    progress = run.history.progress.read(attempt)
    return progress.step if progress else 0


def adapter(run: str) -> bytes:
    return (RunFolder(run).adapter / "adapter_model.safetensors").read_bytes()


def shown(qwenlora, *arguments) -> str:
    answer = qwenlora(*arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_the_result_of_a_job_on_two_nodes_is_the_run_s_summary(folder, qwenlora):
    """The run folder's name is what a shell and Slurm would like to read otherwise."""
    name = "runs/$(touch x); a'b\"c 你好"
    job = submit("my.yaml", {"run_dir": name}, nodes=2, timeout_min=10, name="$(touch x)", snapshot=True)
    summary = result(job)
    assert (summary["reason"], summary["step"], summary["attempts"]) == ("done", 4, 1)
    assert summary["run_dir"] == str(folder / name)
    assert (attempts(name)[0].processes, attempts(name)[0].job_id) == (2, job.job_id)
    assert not list(folder.rglob("x"))
    wait_for(lambda: state(job) == "COMPLETED")
    assert f"job {job.job_id}: COMPLETED" in shown(qwenlora, "status", job.job_id)
    assert "done: the adapter is in" in shown(qwenlora, "logs", job.job_id)


def test_a_job_that_fails_says_why(folder):
    (folder / "my.jsonl").write_text('{"messages": 3}\n')
    job = submit("my.yaml", {"data.train": "my.jsonl"}, timeout_min=10)
    wait_for(lambda: job.done(force_check=True))
    assert "ValueError: " in str(job.exception())
    assert "my.jsonl:1: " in str(job.exception())
    wait_for(lambda: state(job) == "FAILED")


def test_an_array_of_four_runs_two_at_once(folder, qwenlora):
    """Slurm's own accounting says when each ran."""
    jobs = submit_sweep("my.yaml", {"lora.r": [2, 4], "train.seed": [1, 2]}, max_parallel=2, timeout_min=10)
    assert [job.job_id.partition("_")[2] for job in jobs] == ["0", "1", "2", "3"]
    summaries = [result(job) for job in jobs]
    names = [
        "lora.r=2,train.seed=1",
        "lora.r=2,train.seed=2",
        "lora.r=4,train.seed=1",
        "lora.r=4,train.seed=2",
    ]
    assert [Path(summary["run_dir"]).name for summary in summaries] == names
    assert {summary["reason"] for summary in summaries} == {"done"}
    assert [path.name for path in (folder / "runs" / "my").iterdir() if path.name.startswith(".")].count(
        ".prepared"
    ) == 1
    spans = [(attempt.start, attempt.end) for name in names for attempt in attempts(f"runs/my/{name}")]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2
    lines = shown(qwenlora, "status", "runs/my").splitlines()
    assert [line.partition(": done")[0] for line in lines[:4]] == names


@pytest.mark.long
def test_a_signal_before_the_time_limit_brings_the_job_back_to_the_same_end(folder):
    """USR2 is what submitit has Slurm send, to the tasks of both nodes."""
    long = {"train.max_steps": 30, "train.save_strategy": "no"}
    undisturbed = submit("my.yaml", long | {"run_dir": "runs/undisturbed"}, nodes=2, timeout_min=10)
    assert result(undisturbed)["attempts"] == 1
    job = submit("my.yaml", long | {"run_dir": "runs/disturbed"}, nodes=2, timeout_min=10)
    run = RunFolder("runs/disturbed")
    wait_for(lambda: step(run, 1) >= 2)
    subprocess.run(["scancel", "--signal=USR2", job.job_id], check=True, timeout=20)
    summary = result(job)
    assert (summary["reason"], summary["attempts"], summary["step"]) == ("done", 2, 30)
    assert [attempt.reason for attempt in attempts("runs/disturbed")] == ["stopped", "done"]
    assert {attempt.job_id for attempt in attempts("runs/disturbed")} == {job.job_id}
    assert adapter("runs/disturbed") == adapter("runs/undisturbed")


def test_a_cancelled_run_saves_and_stays_away_until_it_is_resumed(folder, qwenlora):
    job = submit("my.yaml", {"train.max_steps": 200, "train.save_strategy": "no"}, timeout_min=10)
    run = RunFolder("runs/my")
    wait_for(lambda: step(run, 1) >= 2)
    assert f"job {job.job_id}: RUNNING" in shown(qwenlora, "status", "runs/my")
    assert cancel(find("runs/my"), now=False) == [
        f"job {job.job_id} is asked to save and to stop; --now stops at once, without saving"
    ]
    wait_for(lambda: find("runs/my").job().state not in ("RUNNING", "COMPLETING"))
    time.sleep(2)
    assert find("runs/my").job().state not in ("PENDING", "RUNNING")
    assert [attempt.reason for attempt in attempts("runs/my")] == ["stopped"]
    assert len(run.checkpoints()) == 1
    said = resume(find("runs/my"))
    assert said.startswith("job ")
    wait_for(lambda: len(attempts("runs/my")) == 2 and step(run, 2))
    assert attempts("runs/my")[1].first_step > 1
    cancel(find("runs/my"), now=True)
    wait_for(lambda: find("runs/my").job().state == "CANCELLED" and not find("runs/my").job().completing)


def test_a_job_that_waits_is_shown_and_cancelled(folder, qwenlora):
    job = submit("my.yaml", nodes=2, timeout_min=10, site=site(folder, {"sbatch": {"hold": True}}))
    assert f"job {job.job_id}: PENDING · waits: JobHeldUser" in shown(qwenlora, "status", "runs/my")
    assert shown(qwenlora, "cancel", job.job_id) == f"job {job.job_id} is cancelled\n"
    wait_for(lambda: state(job).startswith("CANCELLED"))


def test_what_sbatch_refuses_is_said_in_its_words(folder):
    with pytest.raises(ValueError, match="sbatch refused the job: .*[Ii]nvalid partition"):
        submit("my.yaml", timeout_min=10, site=site(folder, {"partition": "nowhere"}))
    assert not (folder / "runs" / ".submitted" / "my" / "1").exists()


def site(folder: Path, values: dict) -> Path:
    file = folder / "site.yaml"
    file.write_text(json.dumps(values))
    assert os.access(file, os.R_OK)
    return file
