"""`qwenlora resume RUN|JOB`: submit a run again, as its last job was, or put its job back into the queue."""

import contextlib
import shlex
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.jobs.find import RunOrJob
from qwenlora.jobs.ledger import SubmittedJob
from qwenlora.jobs.submission.options import JobOptions
from qwenlora.jobs.submission.submit import prepare
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo


def resume(named: RunOrJob) -> str:
    """Submit a run again, or requeue its job; return what was done. Raises: ValueError if neither can be."""
    job = named.job()
    _refuse(named, job)
    submitted = ledger.submissions(named.run) if named.run and not named.sweep else []
    if submitted:
        return _submit_again(submitted[-1])
    if job:
        return _requeue(job)
    run = named.only_run("resume")
    folder = run.started_in()[0]  # paths in the config are relative to it
    command = f"qwenlora train {shlex.quote(str(run.config))}"
    if folder != Path.cwd():
        command = f"cd {shlex.quote(str(folder))} && {command}"
    raise ValueError(f"{run.path} was not submitted from here; this goes on with it: {command}")


def _refuse(named: RunOrJob, job: JobInfo | None) -> None:
    """Raise ValueError for a run that is under way or done."""
    if job and job.is_alive:
        ending = f"is being stopped ({job.state}); wait for its end"
        raise ValueError(f"job {job.job_id} {ending if job.completing else f'is {job.state} already'}")
    if not job and named.runs_here():
        raise ValueError(f"{named.only_run('resume').path} is running already")
    if named.run and named.run.done:
        raise ValueError(f"{named.run.path} is done; more train.max_steps or num_train_epochs make it longer")


def _submit_again(last: SubmittedJob) -> str:
    options = JobOptions(
        cluster=last.cluster,
        nodes=(last.min_nodes or last.nodes, last.nodes),
        gpus_per_node=last.gpus_per_node,
        cpus_per_task=last.cpus_per_task,
        timeout_min=last.timeout_min,
        site=last.site,
        snapshot=last.snapshot,
        name=last.name,
    )
    source = Path(last.folder) / "code" / "qwenlora" if last.snapshot else None
    with contextlib.chdir(last.work_dir):  # paths in the config are relative to it
        job = prepare(str(last.config), (), options, source=source).submit()[0]
    if last.cluster == "debug":
        job.result()
    return f"job {job.job_id} is submitted"


def _requeue(job: JobInfo) -> str:
    if problem := query.requeue(job.job_id):
        again = f"; submit it again, with the options it had: sbatch {job.command}" if job.command else ""
        raise ValueError(f"job {job.job_id} cannot be requeued: {problem}{again}")
    return f"job {job.job_id} is requeued"
