"""`qwenlora status RUN|JOB|SWEEP`: a run as its owner sees it, from its files and what Slurm says of its job.

It may be waiting, running, or long over.
"""

from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.table import Table

from qwenlora.jobs import ledger
from qwenlora.jobs.find import Found, is_alive
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import goodput
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Attempt, now
from qwenlora.slurm import query as answers


def show(found: Found, console: Console) -> None:
    """Print a line on where the run is, one on its job, and a table of its attempts; of a sweep, a line a
    run."""
    for run in found.sweep:
        lines = ledger.submissions(run)
        waiting = f"{run.path.name}: {_job(lines[-1].job_id, answers.ask(lines[-1].job_id))}"
        attempts = run.history.attempts()
        console.print(_where(run, attempts) if attempts else waiting, soft_wrap=True)
    attempts = found.run.history.attempts() if found.run and not found.sweep else []
    if found.run and attempts:
        job = found.job()
        console.print(_where(found.run, attempts, job), soft_wrap=True)
    if found.job_id:
        console.print(_job(found.job_id, found.job()), soft_wrap=True)
    if attempts:
        console.print(_table(attempts))
    for line in _last_words(attempts) if attempts else []:
        console.print(line, soft_wrap=True)


def _job(job_id: str, job: answers.Job | None) -> str:
    """Return what Slurm says of a job."""
    if job is None:
        return f"job {job_id}: Slurm does not know it any more"
    parts = [f"job {job_id}: {job.state}"]
    if job.state == "PENDING" and job.reason:
        parts.append(f"waits: {job.reason.replace('_', ' ')}")
    if job.state == "RUNNING" and job.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(job.seconds_left))} left of its time")
    if job.nodes:
        parts.append(f"on {', '.join(job.nodes)}")
    if job.restarts:
        parts.append(f"started again {job.restarts} time{'s' * (job.restarts != 1)}")
    return " · ".join(parts)


def _where(run: RunFolder, attempts: list[Attempt], job: answers.Job | None = None) -> str:
    last = next((one for one in reversed(attempts) if one.reason != "refused"), attempts[-1])
    progress = run.history.progress.read(last.attempt)
    over = run.abandoned or (job is not None and not is_alive(job))
    said: str = last.reason or ("killed" if over else "running")
    if job and job.state == "PENDING" and said != "done":
        said = "waits to go on"
    parts = [f"{run.path.name}: {said}", f"step {progress.step if progress else run.history.last_step()}"]
    if said == "running" and progress:
        parts[1] += f", {datetime.now(UTC).timestamp() - progress.time:.0f} s ago"
    if line := last_line(run.metrics, "loss"):
        parts.append(f"loss {line['loss']:.4f} at step {line['step']}")
    checkpoints = run.checkpoints()
    count = f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)}"
    parts.append(f"{count}, newest {checkpoints[0].name}" if checkpoints else "no checkpoint")
    if (share := goodput(run.history.so_far())) is not None:
        parts.append(f"goodput {share:.0%}")
    return " · ".join(parts)


def _table(attempts: list[Attempt]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    jobs = any(attempt.job_id for attempt in attempts)
    causes = any(attempt.cause for attempt in attempts)
    right = ("#", "ranks", "from", "again", "restart")
    # within 80 columns: how long starts took gives way to what Slurm did
    names = ("#", "start (UTC)", "took", "ranks", *["job"] * jobs, "from", "steps", "again")
    for name in (*names, *["restart"] * (not jobs), "ended", *["cause"] * causes):
        table.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    for attempt in attempts:
        first, again, start_s = attempt.first_step, attempt.steps_repeated, attempt.restart_s
        table.add_row(
            str(attempt.attempt),
            f"{attempt.start:%m-%d %H:%M}",
            _took(attempt),
            str(attempt.processes),
            *[str(attempt.job_id)] * jobs,
            (attempt.resumed_from or "-").removeprefix("checkpoint-"),
            f"{first}-{attempt.last_step or ''}" if first else "-",
            "-" if again is None else str(again),
            *["-" if start_s is None else f"{start_s:.1f} s"] * (not jobs),
            attempt.reason or "-",
            *[attempt.cause or "-"] * causes,
        )
    return table


def _last_words(attempts: list[Attempt]) -> list[str]:
    """Return where the time of the last attempt's start went, and why it ended."""
    last = attempts[-1]
    seconds = last.seconds or {}
    parts = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items()]
    lines = [f"the last start took {sum(seconds.values()):.1f} s: {', '.join(parts)}"] if parts else []
    if last.message:
        lines.append(f"attempt {last.attempt} {last.reason}: {last.message}")
    return lines


def _took(attempt: Attempt) -> str:
    return str(timedelta(seconds=round(((attempt.end or now()) - attempt.start).total_seconds())))
