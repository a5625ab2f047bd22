"""The state of a run: one rule for all commands (docs/run-states.md). jobs/find.py collects its inputs."""

from collections.abc import Sequence
from typing import Literal

from qwenlora.run.records import Attempt
from qwenlora.slurm.query import JobInfo

RunState = Literal[
    "done",
    "stopped",
    "failed",
    "killed",
    "refused",
    "running",
    "waiting",
    "waits to go on",
    "not started",
    "unknown",
]
# longer than any step, save or evaluation: an agent ends an attempt that stalls long before
SILENT_S = 3600.0


def state_of(
    attempts: Sequence[Attempt],
    *,
    trained: bool,
    job: JobInfo | None = None,
    local_job_is_alive: bool = False,
    holder_is_alive: bool | None = None,
    silent_s: float = 0.0,
) -> RunState:
    """Return the state of a run.

    trained: training wrote something to the folder; job: Slurm's facts on the run's newest job, None without;
    local_job_is_alive: of `submit` with cluster=local; holder_is_alive: whether the process that last locked
    the folder lives, None if it is another machine's; silent_s: seconds since the run last wrote there.
    """
    last = last_accepted(attempts)
    if last is None:
        return _before_the_first(attempts, trained, job, local_job_is_alive)
    if last.reason == "done":
        return "done"
    if _is_pending(job) and (last.reason or not holder_is_alive):
        return "waits to go on"
    return last.reason or _without_an_end(last, job, holder_is_alive, silent_s)


def last_accepted(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the last attempt that was not refused: a refused one changed nothing."""
    return next((attempt for attempt in reversed(attempts) if attempt.reason != "refused"), None)


def _is_pending(job: JobInfo | None) -> bool:
    return job is not None and job.state == "PENDING"


def _before_the_first(
    attempts: Sequence[Attempt], trained: bool, job: JobInfo | None, local_job_is_alive: bool
) -> RunState:
    """Return the state of a run of which no attempt was accepted."""
    if _is_pending(job):
        return "waiting"
    if attempts:
        return "refused"
    if local_job_is_alive or (job and job.is_alive):
        return "running"
    return "unknown" if trained else "not started"


def _without_an_end(
    attempt: Attempt, job: JobInfo | None, holder_is_alive: bool | None, silent_s: float
) -> RunState:
    """Return the state of a run whose last attempt has not recorded how it ended."""
    if holder_is_alive is not None:
        return "running" if holder_is_alive else "killed"
    if attempt.job_id and job:  # without a job_id it was started by hand, and the job is an older one
        return "running" if job.is_alive else "killed"
    return "running" if silent_s < SILENT_S else "unknown"
