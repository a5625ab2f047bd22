"""What a user names on a command line: a run folder, a sweep's folder, or the id of a Slurm job."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.run.folder import RunFolder
from qwenlora.slurm import query as answers

_JOB_ID = re.compile(r"\d+(_\d+)?")
_DEPTHS = ("", "*/", "*/*/")  # run folders lie in runs/, those of a sweep one deeper


@dataclass(frozen=True)
class Found:
    """run: None when only Slurm knows the job; job_id: None when the run never was a job. sweep: the runs
    below run."""

    run: RunFolder | None
    job_id: str | None
    sweep: tuple[RunFolder, ...] = ()

    def job(self) -> answers.Job | None:
        """Return what Slurm says of the job now; None when it does not know it (any more)."""
        return answers.ask(self.job_id) if self.job_id else None

    def runs_here(self) -> bool:
        """Whether the run is under way without Slurm, as far as this machine and the run's files tell."""
        if self.run is None:
            return False
        lines = ledger.submissions(self.run)
        if lines and lines[-1].cluster == "local" and _is_submitit(lines[-1].job_id):
            return True  # perhaps before its first attempt
        return self.run.history.unfinished is not None and not self.run.abandoned

    def alive(self) -> str:
        """Return what the run is under way as, in words; empty when it is not, as far as is known here."""
        job = self.job()
        if job and is_alive(job):
            return f"job {job.job_id} ({job.state})"
        return "a process of this machine" if self.runs_here() else ""

    def one(self, command: str) -> RunFolder:
        """Return the run, for a command that can do with no more and no less. Raises: ValueError."""
        if self.sweep and self.run:
            names = ", ".join(str(run.path) for run in self.sweep[:3])
            raise ValueError(
                f"{self.run.path} holds {len(self.sweep)} runs; name one to {command}, such as {names}"
            )
        if self.run is None:
            raise ValueError(f"job {self.job_id}: its run folder is not known here; name the run folder")
        return self.run


def is_alive(job: answers.Job) -> bool:
    """Whether a job waits, runs, or is being stopped, perhaps to run again."""
    return job.completing or job.state in answers.UNDER_WAY


def find(named: str) -> Found:
    """Return what is named. Raises: ValueError when there is nothing of the kind."""
    run = RunFolder(named)
    if run.history.file.exists() or ledger.submissions(run):
        runs = tuple(ledger.sweep_runs(run))
        return Found(run, newest_job(run), runs)
    if runs := tuple(ledger.sweep_runs(run)):
        return Found(run, None, runs)
    if not _JOB_ID.fullmatch(named):
        raise ValueError(
            f"{named} holds no run: it has no attempts.jsonl; name a run folder, such as runs/tiny, or a job"
        )
    known = answers.ask(named)
    for folder in dict.fromkeys([Path.cwd(), *([known.work_dir] if known and known.work_dir else [])]):
        for run in _runs_below(folder):
            ids = {job.job_id for job in ledger.submissions(run)}
            ids |= {attempt.job_id or "" for attempt in run.history.attempts()}
            if named in ids or (known is not None and known.job_id in ids):
                return Found(run, named, tuple(ledger.sweep_runs(run)))
    if known is None:
        raise ValueError(
            f"job {named} is known neither to Slurm nor to a run below {Path.cwd()}; name a run folder"
        )
    return Found(None, named)


def _runs_below(folder: Path) -> Iterator[RunFolder]:
    for depth in _DEPTHS:
        for file in sorted(folder.glob(f"{depth}.submitted/*/jobs.jsonl")):
            yield RunFolder(file.parents[2] / file.parent.name)
        for file in sorted(folder.glob(f"{depth}*/attempts.jsonl")):
            yield RunFolder(file.parent)


def _is_submitit(process: str) -> bool:
    try:
        return b"submitit" in Path("/proc", process, "cmdline").read_bytes()
    except OSError:
        return False


def newest_job(run: RunFolder) -> str | None:
    """Return the job that the run is under way as, else the one that was submitted, or that started, last."""
    unfinished = run.history.unfinished
    if unfinished and unfinished.job_id and (job := answers.ask(unfinished.job_id)) and is_alive(job):
        return unfinished.job_id
    jobs = [(job.time, job.job_id) for job in ledger.submissions(run) if job.cluster == "slurm"]
    if jobs and "_" in jobs[-1][1]:  # one of an array: its attempts say another number of the same job
        return jobs[-1][1]
    attempts = run.history.attempts()
    jobs += [(attempt.start, attempt.job_id) for attempt in attempts if attempt.job_id]
    return max(jobs)[1] if jobs else None
