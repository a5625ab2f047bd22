"""`qwenlora status RUN|JOB|SWEEP`: the state of a run, from its files and from what Slurm says of its job."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from qwenlora.jobs import ledger
from qwenlora.jobs.find import RunOrJob, state
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import clock, count
from qwenlora.run.history import goodput, inside_job
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Attempt, now
from qwenlora.run.state import last_accepted
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo

_RIGHT = ("#", "ranks", "from", "again", "restart")  # columns of numbers


def show_status(named: RunOrJob, console: Console) -> None:
    """Print a line on the run, a line on its job, and a table of its attempts; of a sweep, a line a run."""
    for run in named.sweep:
        job_id = ledger.submissions(run)[-1].job_id
        job, attempts = query.ask(job_id), run.history.attempts()
        line = run_line(run, attempts, job) if attempts else f"{run.path.name}: {job_line(job_id, job)}"
        console.print(line, soft_wrap=True)
    job = named.job()
    attempts = named.run.history.attempts() if named.run and not named.sweep else []
    if named.run and attempts:
        console.print(run_line(named.run, attempts, job), soft_wrap=True)
    if named.job_id:
        console.print(job_line(named.job_id, job), soft_wrap=True)
    if attempts:
        console.print(attempt_table(attempts))
        for line in (*_restarts(attempts), *details(attempts[-1]), *_slow(named.run), *_bad_nodes(named.run)):
            console.print(line, soft_wrap=True)


def job_line(job_id: str, job: JobInfo | None) -> str:
    """Return what Slurm says of a job."""
    if job is None:
        return f"job {job_id}: Slurm does not know it any more"
    parts = [f"job {job_id}: {job.state}"]
    if job.state == "PENDING" and job.reason:
        parts.append(f"waits: {job.reason.replace('_', ' ')}")
    if job.state == "RUNNING" and job.seconds_left is not None:
        parts.append(f"{clock(job.seconds_left)} left of its time")
    if job.nodes:
        parts.append(f"on {', '.join(job.nodes)}")
    if job.restarts:
        parts.append(f"started again {count(job.restarts, 'time')}")
    return " · ".join(parts)


def run_line(run: RunFolder, attempts: list[Attempt], job: JobInfo | None) -> str:
    """Return the state of a run, how far it is, its loss, its checkpoints and its goodput."""
    last = last_accepted(attempts) or attempts[-1]
    progress = run.history.progress.read(last.attempt)
    run_state = state(run, attempts, job)
    step = f"step {progress.step if progress else run.history.last_step()}"
    if progress and not last.reason and run_state in ("running", "unknown"):
        step += f", {time.time() - progress.time:.0f} s ago"
    parts = [f"{run.path.name}: {run_state}", step]
    if line := last_line(run.metrics, "loss"):
        parts.append(f"loss {line['loss']:.4f} at step {line['step']}")
    parts.append(_checkpoints(run))
    if (share := goodput(run.history.so_far())) is not None:
        parts.append(f"goodput {share:.0%}")
    return " · ".join(parts)


def _checkpoints(run: RunFolder) -> str:
    folders = run.checkpoints()
    return f"{count(len(folders), 'checkpoint')}, newest {folders[0].name}" if folders else "no checkpoint"


def attempt_table(attempts: list[Attempt]) -> Table:
    """Return a table with a row for each attempt."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    jobs = any(attempt.job_id for attempt in attempts)
    causes = any(attempt.cause_in_words for attempt in attempts)
    # within 80 columns there is room for the job's number or for the seconds that the start took
    names = ("#", "start (UTC)", "took", "ranks", *["job"] * jobs, "from", "steps", "again")
    for name in (*names, *["restart"] * (not jobs), "ended", *["cause"] * causes):
        table.add_column(name, no_wrap=True, justify="right" if name in _RIGHT else "left")
    for attempt in attempts:
        table.add_row(*_cells(attempt, jobs=jobs, causes=causes))
    return table


def _cells(attempt: Attempt, *, jobs: bool, causes: bool) -> list[str]:
    """Return the cells of an attempt's row. jobs, causes: whether the table has these columns."""
    first, again, start_s = attempt.first_step, attempt.steps_repeated, attempt.restart_s
    return [
        str(attempt.attempt),
        f"{attempt.start:%m-%d %H:%M}",
        clock(((attempt.end or now()) - attempt.start).total_seconds()),
        str(attempt.processes),
        *[str(attempt.job_id)] * jobs,
        (attempt.resumed_from or "-").removeprefix("checkpoint-"),
        f"{first}-{attempt.last_step or ''}" if first else "-",
        "-" if again is None else str(again),
        *["-" if start_s is None else f"{start_s:.1f} s"] * (not jobs),
        attempt.reason or "-",
        *[attempt.cause_in_words or "-"] * causes,
    ]


def _restarts(attempts: list[Attempt]) -> Iterator[str]:
    """Yield a line on the attempts that began inside a job, if any."""
    if again := inside_job(attempts):
        took = ", ".join("-" if seconds is None else f"{seconds:.1f} s" for _, seconds in again)
        yield f"went on inside the job {count(len(again), 'time')}; until the first step: {took}"


def _slow(run: RunFolder | None) -> list[str]:
    """Return a line on each rank that was found slow."""
    paces = run.read_paces() if run else None
    return paces.slow if paces else []


def _bad_nodes(run: RunFolder | None) -> Iterator[str]:
    """Yield a line on each bad node."""
    for host, entries in BadNodes.beside(run).bad().items() if run else ():
        yield f"bad: {host}: {entries[0].line}"


def details(attempt: Attempt) -> list[str]:
    """Return lines that say where the time of an attempt's start went, and why it ended."""
    lines = []
    if attempt.seconds:
        parts = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in attempt.seconds.items()]
        lines.append(f"the last start took {attempt.restart_s:.1f} s: {', '.join(parts)}")
    if attempt.message:
        lines.append(f"attempt {attempt.attempt} {attempt.reason}: {attempt.message}")
    return lines
