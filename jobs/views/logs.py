"""`qwenlora logs RUN|JOB`: what a run has said, and with -f what it says, over all of its attempts."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from qwenlora.jobs import ledger
from qwenlora.jobs.find import Found, is_alive

POLL_S = 0.5
ASK_S = 10.0  # Slurm is asked this often whether the job is over


def show(found: Found, *, rank: int | None, follow: bool) -> None:
    """Write the log to the screen. rank: that process' own, of the last attempt; None: the job's output.

    Raises: ValueError when there is none (yet).
    """
    file = _file(found, rank)
    if file is None or not (file.exists() or follow):
        where = f" (it will be {file})" if file else ""
        raise ValueError(
            f"{found.run.path if found.run else found.job_id}: no log yet{where}; -f waits for it"
        )
    if follow:
        _follow(lambda: _file(found, rank), _over(found))
    else:
        _write_from(file, 0)


def _file(found: Found, rank: int | None) -> Path | None:
    if rank is None and (output := _output(found)):
        return output
    run = found.one("see its log")
    attempts = run.history.attempts()
    return run.log(len(attempts), f"rank-{rank or 0}") if attempts else None


def _output(found: Found) -> Path | None:
    """Return the file that the job's first node writes to."""
    lines = ledger.submissions(found.run) if found.run and not found.sweep else []
    ours = [line for line in lines if line.job_id == found.job_id or line.cluster == "local"]
    if ours and (found.job_id is None or ours[-1].job_id == found.job_id):
        return Path(ours[-1].folder) / f"{ours[-1].job_id}_0_log.out"
    job = found.job()
    return job.stdout if job else None


def _over(found: Found) -> Callable[[], bool]:
    """Return what says whether the run is over."""
    asked, answer = float("-inf"), False

    def over() -> bool:
        nonlocal asked, answer
        if time.monotonic() - asked > ASK_S:
            job = found.job()
            asked, answer = time.monotonic(), not is_alive(job) if job else not found.runs_here()
        return answer

    return over


def _follow(file: Callable[[], Path | None], over: Callable[[], bool]) -> None:
    """Write a file as it grows; when a new attempt has another one, go on with that."""
    current, position = file(), 0
    while True:
        ends = over()  # asked first: what was written before the end is still shown
        newest = file()
        for path in dict.fromkeys([current, newest]):
            if path != current:
                current, position = path, 0
            position = _write_from(path, position)
        if ends:
            return
        time.sleep(POLL_S)


def _write_from(path: Path | None, position: int) -> int:
    if path is None or not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    sys.stdout.buffer.write(content)  # as bytes: a letter may be half written
    sys.stdout.buffer.flush()
    return position + len(content)
