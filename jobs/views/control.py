"""What an owner does to a run: cancel it, or have it go on."""

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.jobs.find import Found, is_alive
from qwenlora.slurm import query as answers


def cancel(found: Found, *, now: bool) -> list[str]:
    """Stop a run, or all runs of a sweep, for good; return what was done, a line each.

    A run that has started saves first, unless now. Raises: ValueError when nothing is there to stop.
    """
    if not found.sweep:
        return [_cancel(found, now=now)]
    lines = []
    for run in found.sweep:
        job_id = ledger.submissions(run)[-1].job_id
        with contextlib.suppress(ValueError):  # it is over
            lines.append(_cancel(Found(run, job_id), now=now))
    return lines or [f"no run of {found.run.path if found.run else found.job_id} is under way"]


def resume(found: Found) -> str:
    """Have a run go on as the job that it was; return what was done. Raises: ValueError when that cannot
    be."""
    job = found.job()
    if job and is_alive(job):
        what = (
            f"is being stopped ({job.state}); wait for its end"
            if job.completing
            else f"is {job.state} already"
        )
        raise ValueError(f"job {job.job_id} {what}")
    if not job and found.runs_here():
        raise ValueError(f"{found.one('resume').path} is running already")
    if found.run and found.run.done:
        raise ValueError(f"{found.run.path} is done; more train.max_steps or num_train_epochs make it longer")
    lines = ledger.submissions(found.run) if found.run and not found.sweep else []
    if lines:
        return _submit_again(lines[-1])
    if job:
        if problem := answers.requeue(job.job_id):
            again = f"; submit it again, with the options it had: sbatch {job.command}" if job.command else ""
            raise ValueError(f"job {job.job_id} cannot be requeued: {problem}{again}")
        return f"job {job.job_id} is requeued"
    run = found.one("resume")
    config = shlex.quote(str(run.config))
    raise ValueError(f"{run.path} was not submitted from here; this goes on with it: qwenlora train {config}")


def _cancel(found: Found, *, now: bool) -> str:
    job = found.job()
    if job and is_alive(job):
        if now or job.state != "RUNNING":
            _slurm("scancel", job.job_id)
            return f"job {job.job_id} is cancelled"
        # first: it must not come back; the signal goes to the steps, not to the batch shell
        _slurm("scontrol", "update", f"JobId={job.job_id}", "Requeue=0")
        _slurm("scancel", "--signal=USR1", job.job_id)
        return f"job {job.job_id} is asked to save and to stop; --now stops at once, without saving"
    run = found.one("cancel")
    process = run.holder
    if run.history.unfinished is None or process is None or not Path("/proc", str(process)).exists():
        over = f"; its job {job.job_id} is over: {job.state}" if job else ", nor as a job that Slurm knows"
        raise ValueError(f"{run.path} is not running on this machine{over}")
    os.kill(process, signal.SIGKILL if now else signal.SIGTERM)
    return f"process {process} is {'killed' if now else 'asked to save and to stop'}"


def _submit_again(last: ledger.SubmittedJob) -> str:
    from qwenlora.jobs.submission.submit import Asked, prepare  # submitit takes a moment to import

    asked = Asked(
        cluster=last.cluster,
        nodes=last.nodes,
        gpus_per_node=last.gpus_per_node,
        cpus_per_task=last.cpus_per_task,
        timeout_min=last.timeout_min,
        snapshot=last.snapshot,
        name=last.name,
    )
    source = Path(last.folder) / "code" / "qwenlora" if last.snapshot else None
    with contextlib.chdir(last.work_dir):  # what the paths in the config are relative to
        job = prepare(str(last.config), (), asked, last.site, source).submit()[0]
    if asked.cluster == "debug":
        job.result()
    return f"job {job.job_id} is submitted"


def _slurm(*argv: str) -> None:
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = " ".join((answer.stderr or answer.stdout).split())
        raise ValueError(f"{shlex.join(argv)} failed: {said or f'exit code {answer.returncode}'}")
