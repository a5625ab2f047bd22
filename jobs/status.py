"""`qwenlora status RUN`: the run as its owner sees it, from its files alone; it may be running, or long over."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwenlora.jobs.history import goodput
from qwenlora.jobs.run import RunFolder


def show(path: Path, console: Console) -> None:
    """Print a line on where the run is and a table of its attempts. Raises: ValueError when there is no run."""
    run = RunFolder(path)
    attempts = run.history.attempts()
    if not attempts:
        raise ValueError(f"{path} holds no run: it has no attempts.jsonl; name a run folder, such as runs/tiny")
    console.print(_where(run, attempts), soft_wrap=True)
    console.print(_table(attempts))
    for line in _last_words(attempts):
        console.print(line, soft_wrap=True)


def _where(run: RunFolder, attempts: list[dict[str, Any]]) -> str:
    last = next((one for one in reversed(attempts) if one.get("reason") != "refused"), attempts[-1])
    progress = run.history.progress.read(last["attempt"])
    said = last.get("reason", "killed" if run.abandoned else "running")
    parts = [f"{run.path.name}: {said}", f"step {progress.get('step') or run.history.last_step()}"]
    if said == "running" and progress:
        parts[1] += f", {datetime.now(UTC).timestamp() - progress['time']:.0f} s ago"
    if line := _last_metrics(run):
        parts.append(f"loss {line['loss']:.4f} at step {line['step']}")
    checkpoints = run.checkpoints()
    count = f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)}"
    parts.append(f"{count}, newest {checkpoints[0].name}" if checkpoints else "no checkpoint")
    if (share := goodput(run.history.so_far("running"))) is not None:
        parts.append(f"goodput {share:.0%}")
    return " · ".join(parts)


def _table(attempts: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    jobs = any(attempt["job_id"] for attempt in attempts)
    right = ("#", "procs", "again", "restart")
    for name in ("#", "start (UTC)", "took", "procs", *["job"] * jobs, "from", "steps", "again", "restart", "ended"):
        table.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    for attempt in attempts:
        reason = attempt.get("reason", "-")
        trained = attempt.get("first_step")
        table.add_row(
            str(attempt["attempt"]),
            attempt["start"][5:16].replace("T", " "),
            _took(attempt),
            str(attempt["processes"]),
            *[str(attempt["job_id"])] * jobs,
            attempt.get("resumed_from") or "-",
            f"{trained}-{attempt.get('last_step', '')}" if trained else "-",
            str(attempt.get("steps_repeated", "-")),
            f"{sum(attempt['seconds'].values()):.1f} s" if "seconds" in attempt else "-",
            reason,
        )
    return table


def _last_words(attempts: list[dict[str, Any]]) -> list[str]:
    """Return where the time of the last attempt's start went, and why it ended."""
    last = attempts[-1]
    seconds: dict[str, float] = last.get("seconds", {})
    parts = [f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items()]
    lines = [f"the last start took {sum(seconds.values()):.1f} s: {', '.join(parts)}"] if parts else []
    return [*lines, f"attempt {last['attempt']} {last['reason']}: {last['message']}"] if last.get("message") else lines


def _took(attempt: dict[str, Any]) -> str:
    end = datetime.fromisoformat(attempt["end"]) if "end" in attempt else datetime.now(UTC)
    return str(timedelta(seconds=round((end - datetime.fromisoformat(attempt["start"])).total_seconds())))


def _last_metrics(run: RunFolder) -> dict[str, Any] | None:
    """Return the last line of metrics.jsonl that has a loss."""
    if not run.metrics.exists():
        return None
    with run.metrics.open("rb") as file:
        file.seek(max(run.metrics.stat().st_size - 2**16, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:  # half a line
            continue
        if "loss" in record:
            return record
    return None
