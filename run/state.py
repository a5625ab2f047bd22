"""The state of a run: one rule for status, runs, diff, report and Python. docs/run-states.md has its table.

`state_of(attempts, job=query.ask(job_id), ...)`; jobs/find.py's `state` collects what it needs.
"""

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
SILENT_S = (
    3600.0  # longer than any step, save or evaluation: an agent ends an attempt that stalls long before
)


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

    trained: the folder holds something that training made; job: what Slurm says of the run's newest job, None
    when it knows none; local_job_is_alive: a process that `submit` with cluster=local started is alive;
    holder_is_alive: so is the process that last locked the folder, None when it is another machine's;
    silent_s: seconds since the run last wrote to its folder.
    """
    last = next((attempt for attempt in reversed(attempts) if attempt.reason != "refused"), None)
    if last and last.reason == "done":
        return "done"
    if job and job.state == "PENDING":
        return "waits to go on" if last else "waiting"
    if last is None:
        return _before_the_first(
            attempts, trained, under_way=local_job_is_alive or bool(job and job.is_alive)
        )
    if last.reason:
        return last.reason
    if holder_is_alive is not None:
        return "running" if holder_is_alive else "killed"
    if last.job_id and job:  # without job_id it was started by hand, and the job is an older one
        return "running" if job.is_alive else "killed"
    return "running" if silent_s < SILENT_S else "unknown"


def _before_the_first(attempts: Sequence[Attempt], trained: bool, *, under_way: bool) -> RunState:
    """Return the state of a run of which no attempt was accepted. under_way: its job runs."""
    if attempts:
        return "refused"
    if under_way:
        return "running"
    return "unknown" if trained else "not started"
