"""`qwenlora cancel RUN|JOB`: stop a run, or all runs of a sweep, for good."""

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.jobs.find import RunOrJob


def cancel(named: RunOrJob, *, now: bool) -> list[str]:
    """Stop a run, or all runs of a sweep, for good; return what was done, a line each. A run that has started
    saves first, unless now. Raises: ValueError when the run is not under way."""
    if not named.sweep:
        return [_cancel_run(named, now=now)]
    lines = []
    for run in named.sweep:
        job_id = ledger.submissions(run)[-1].job_id
        with contextlib.suppress(ValueError):  # this run is over
            lines.append(_cancel_run(RunOrJob(run, job_id), now=now))
    return lines or [f"no run of {named.run.path if named.run else named.job_id} is under way"]


def _cancel_run(named: RunOrJob, *, now: bool) -> str:
    job = named.job()
    if job and job.is_alive:
        if now or job.state != "RUNNING":
            _run("scancel", job.job_id)
            return f"job {job.job_id} is cancelled"
        # Requeue=0 first, so that it cannot come back; the signal goes to the steps, not to the batch shell
        _run("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
        _run("scancel", "--signal=USR1", job.job_id)
        return f"job {job.job_id} is asked to save and to stop; --now stops at once, without saving"
    run = named.only_run("cancel")
    process = run.holder
    if run.history.unfinished is None or process is None or not Path("/proc", str(process)).exists():
        why = f"; its job {job.job_id} is over: {job.state}" if job else ", nor as a job that Slurm knows"
        raise ValueError(f"{run.path} is not running on this machine{why}")
    os.kill(process, signal.SIGKILL if now else signal.SIGTERM)
    return f"process {process} is {'killed' if now else 'asked to save and to stop'}"


def _run(*argv: str) -> None:
    """Run a command of Slurm's. Raises: ValueError with its words when it fails."""
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    if answer.returncode:
        words = " ".join((answer.stderr or answer.stdout).split())
        raise ValueError(f"{shlex.join(argv)} failed: {words or f'exit code {answer.returncode}'}")
