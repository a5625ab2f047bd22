"""From what a user names on a command line (a run folder, a sweep's, a job's id) to the run and its job."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.run.folder import RunFolder, meant
from qwenlora.run.records import Attempt
from qwenlora.run.state import RunState, last_accepted, state_of
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo

_JOB_ID = re.compile(r"\d+(_\d+)?")
_DEPTHS = ("", "*/", "*/*/")  # run folders lie in runs/, those of a sweep one deeper


@dataclass(frozen=True)
class RunOrJob:
    """What a user named. run: None if only Slurm knows the job; job_id: None if no job; sweep: its runs."""

    run: RunFolder | None
    job_id: str | None
    sweep: tuple[RunFolder, ...] = ()

    def job(self) -> JobInfo | None:
        """Return what Slurm says of the job now; None when it does not know the job."""
        return query.ask(self.job_id) if self.job_id else None

    def runs_here(self) -> bool:
        """Whether the run is under way without Slurm, as far as this machine and the run's files tell."""
        if self.run is None:
            return False
        if local_job_is_alive(self.run):
            return True  # perhaps before its first attempt
        return self.run.history.unfinished is not None and not self.run.abandoned

    def under_way_as(self) -> str:
        """Return the job or process that runs it now, in words; empty when none does."""
        job = self.job()
        if job and job.is_alive:
            return f"job {job.job_id} ({job.state})"
        return "a process of this machine" if self.runs_here() else ""

    def only_run(self, command: str) -> RunFolder:
        """Return the run, for a command that takes exactly one. Raises: ValueError."""
        if self.sweep and self.run:
            names = ", ".join(str(run.path) for run in self.sweep[:3])
            raise ValueError(
                f"{self.run.path} holds {len(self.sweep)} runs; name one to {command}, such as {names}"
            )
        if self.run is None:
            raise ValueError(f"job {self.job_id}: its run folder is not known here; name the run folder")
        return self.run


def find(name: str) -> RunOrJob:
    """Return the run or job of that name. Raises: ValueError when there is none."""
    run = RunFolder(name)
    sweep = tuple(ledger.sweep_runs(run))
    if run.history.file.exists() or ledger.submissions(run):
        return RunOrJob(run, newest_job(run, run.history.attempts()), sweep)
    if sweep:
        return RunOrJob(run, None, sweep)
    if not _JOB_ID.fullmatch(name):
        raise ValueError(
            f"{name} holds no run: it has no attempts.jsonl; name a run folder, such as runs/tiny, or a job"
            f"{meant(name)}"
        )
    return _find_job(name)


def _find_job(job_id: str) -> RunOrJob:
    """Look for the run of a job below this folder, and where Slurm says that it was submitted."""
    job = query.ask(job_id)
    folders = [Path.cwd(), *([job.work_dir] if job and job.work_dir else [])]
    same_job = {job_id, *([job.job_id] if job else [])}
    for folder in dict.fromkeys(folders):
        for run in _runs_below(folder):
            if same_job & _job_ids(run):
                return RunOrJob(run, job_id, tuple(ledger.sweep_runs(run)))
    if job is None:
        raise ValueError(
            f"job {job_id} is known neither to Slurm nor to a run below {Path.cwd()}; name a run folder"
        )
    return RunOrJob(None, job_id)


def _runs_below(folder: Path) -> Iterator[RunFolder]:
    for depth in _DEPTHS:
        for file in sorted(folder.glob(f"{depth}.submitted/*/jobs.jsonl")):
            yield RunFolder(file.parents[2] / file.parent.name)
        for file in sorted(folder.glob(f"{depth}*/attempts.jsonl")):
            yield RunFolder(file.parent)


def _job_ids(run: RunFolder) -> set[str]:
    """Return the ids of all jobs of a run."""
    submitted = {job.job_id for job in ledger.submissions(run)}
    return submitted | {attempt.job_id for attempt in run.history.attempts() if attempt.job_id}


def newest_job(run: RunFolder, attempts: Sequence[Attempt]) -> str | None:
    """Return the id of the job that runs it now, else of the job submitted or started last."""
    if attempts and not attempts[-1].end and _is_alive(attempts[-1].job_id):
        return attempts[-1].job_id
    jobs = [(job.time, job.job_id) for job in ledger.submissions(run) if job.cluster == "slurm"]
    if jobs and "_" in jobs[-1][1]:  # a task of an array: attempts have another id for the same job
        return jobs[-1][1]
    jobs += [(attempt.start, attempt.job_id) for attempt in attempts if attempt.job_id]
    return max(jobs)[1] if jobs else None


def _is_alive(job_id: str | None) -> bool:
    job = query.ask(job_id) if job_id else None
    return job is not None and job.is_alive


def state(run: RunFolder, attempts: Sequence[Attempt], job: JobInfo | None) -> RunState:
    """Return the state of a run. attempts: its history; job: what Slurm says of its newest job."""
    return state_of(
        attempts,
        trained=run.trained,
        job=job,
        local_job_is_alive=local_job_is_alive(run),
        holder_is_alive=None if run.holder is None else not run.abandoned,
        silent_s=time.time() - last_sign(run),
    )


def state_now(run: RunFolder, attempts: Sequence[Attempt]) -> RunState:
    """Return the state of a run, after asking Slurm about its newest job if that can matter."""
    last = last_accepted(attempts)
    if last and last.reason == "done":  # asking takes 20 s a run where Slurm hangs
        return "done"
    job_id = newest_job(run, attempts)
    return state(run, attempts, query.ask(job_id) if job_id else None)


def last_sign(run: RunFolder) -> float:
    """Return when the run last wrote to its folder, in seconds since 1970; 0.0 if it never did."""
    files = (run.history.progress.path, run.history.file, run.config, run.submitted)
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def local_job_is_alive(run: RunFolder) -> bool:
    """Whether the run was last submitted as a process of this machine, and that is alive."""
    submitted = ledger.submissions(run)
    if not submitted or submitted[-1].cluster != "local":
        return False
    try:
        return b"submitit" in Path("/proc", submitted[-1].job_id, "cmdline").read_bytes()
    except OSError:
        return False
