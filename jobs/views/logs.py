"""`qwenlora logs RUN|JOB`: the output of a run's job or a rank; with -f as it grows, over all attempts."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.jobs.find import RunOrJob

POLL_S = 0.5
ASK_S = 10.0  # how often Slurm is asked whether the job is over


def show_logs(named: RunOrJob, *, rank: int | None, follow: bool) -> None:
    """Print a rank's log of the last attempt; None: the job's output. Raises: ValueError if it is missing."""
    file = log_file(named, rank)
    if file is None or not (file.exists() or follow):
        where = f" (it will be {file})" if file else ""
        raise ValueError(
            f"{named.run.path if named.run else named.job_id}: no log yet{where}; -f waits for it"
        )
    if follow:
        _follow(lambda: log_file(named, rank), _is_over(named))
    else:
        _write_from(file, 0)


def log_file(named: RunOrJob, rank: int | None) -> Path | None:
    """Return a rank's log of the last attempt, or, for None, the job's output; None where it is unknown."""
    if rank is None and (output := _job_output(named)):
        return output
    run = named.only_run("see its log")
    attempts = run.history.attempts()
    return run.log(len(attempts), f"rank-{rank or 0}") if attempts else None


def _job_output(named: RunOrJob) -> Path | None:
    """Return the file that the job's first node writes to; None where it is not known."""
    submitted = ledger.submissions(named.run) if named.run and not named.sweep else []
    matching = [job for job in submitted if job.job_id == named.job_id or job.cluster == "local"]
    last = matching[-1] if matching else None
    if last and named.job_id in (None, last.job_id):
        return Path(last.folder) / f"{last.job_id}_0_log.out"
    job = named.job()
    return job.stdout if job else None


def _is_over(named: RunOrJob) -> Callable[[], bool]:
    """Return a function that says whether the run is over, and asks Slurm now and then."""
    asked_at, answer = float("-inf"), False

    def is_over() -> bool:
        nonlocal asked_at, answer
        if time.monotonic() - asked_at > ASK_S:
            job = named.job()
            asked_at, answer = time.monotonic(), not (job.is_alive if job else named.runs_here())
        return answer

    return is_over


def _follow(file: Callable[[], Path | None], is_over: Callable[[], bool]) -> None:
    """Write a file as it grows; when a new attempt has another file, go on with that."""
    current, position = file(), 0
    while True:
        over = is_over()  # before reading: what was written before the end is still shown
        newest = file()
        for path in dict.fromkeys([current, newest]):
            if path != current:
                current, position = path, 0
            position = _write_from(path, position)
        if over:
            return
        time.sleep(POLL_S)


def _write_from(path: Path | None, position: int) -> int:
    """Write the rest of a file to the screen; return the position after it, in bytes."""
    if path is None or not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    sys.stdout.buffer.write(content)  # as bytes: a character may be half written
    sys.stdout.buffer.flush()
    return position + len(content)
