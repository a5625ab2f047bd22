"""The lines of a run's report, from its summary: plain texts, which report.html puts in place."""

import math
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qwenlora.adapter.publish import curves
from qwenlora.adapter.publish.run_summary import RunSummary
from qwenlora.run.folder import step_of
from qwenlora.run.format import count, duration, number, short
from qwenlora.run.history import goodput, inside_job
from qwenlora.run.records import Attempt

RANKS = 16  # shown at most: the slowest, and the fastest
CHECKED_CURVES = ("loss", "grad_norm", "eval_loss")  # those whose values must be finite


class Wandb(NamedTuple):
    """The run at W&B. run: id and project; sync: a command to upload offline runs. Empty if not known."""

    url: str
    run: str
    sync: str


def state(summary: RunSummary) -> tuple[str, str, str]:
    """Return the run's state, the message of its last attempt, and the time when that ended."""
    last = summary.last_attempt
    end = f"{last.end:%Y-%m-%d %H:%M} UTC" if last and last.end else ""
    return summary.state, last.message if last else "", end


def tiles(summary: RunSummary) -> Iterator[tuple[str, str, str]]:
    """Yield (name, number, remark) for the numbers that readers look for first."""
    steps = [attempt.last_step or 0 for attempt in summary.attempts]
    steps += [int(series.steps[-1]) for series in summary.curves.values()]
    remarks = [f"of {summary.planned_steps:,}"] if summary.planned_steps else []
    if (epochs := summary.last_value("epoch")) is not None:
        remarks.append(f"{number(epochs)} epochs")
    yield "steps", f"{max(steps, default=0):,}", ", ".join(remarks)
    if (loss := summary.last_value("loss")) is not None:
        yield "training loss", number(loss), "as last logged"
    if (loss := summary.last_value("eval_loss")) is not None:
        last, lowest = int(summary.curves["eval_loss"].steps[-1]), summary.curves["eval_loss"].lowest
        beside = f"; lowest {number(lowest[1])} at {lowest[0]:,}" if lowest and lowest[0] != last else ""
        yield "evaluation loss", number(loss), f"at step {last:,}{beside}"
        yield "perplexity", number(math.exp(loss) if loss < 700 else math.inf), "of the evaluation rows"
    took = sum(filter(None, map(_seconds_of, summary.attempts)))
    yield "time", duration(took), f"in {count(len(summary.attempts), 'attempt')}"
    if (share := goodput(summary.attempts)) is not None:
        yield "goodput", f"{share:.0%}", "of it in steps that were kept"


def about(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """Yield (name, value) lines on the model, the adapter and the machine."""
    run, revision = summary.run, summary.settings.get("model.revision")
    base = summary.settings.get("model.name_or_path", "-")
    yield "base model", f"{base}, revision {revision}" if revision else str(base)
    if summary.facts:
        trainable, total = summary.facts.parameters.trainable, summary.facts.parameters.total
        share = trainable / max(trainable + total, 1)
        yield "trained", f"{trainable:,} parameters beside the base's {total:,} ({share:.2%} of all)"
    weights = run.adapter / "adapter_model.safetensors"
    yield "adapter", f"{weights.stat().st_size / 1e6:,.1f} MB" if weights.is_file() else "not there yet"
    if folders := run.checkpoints():
        yield "checkpoints", ", ".join(f"{step_of(folder):,}" for folder in reversed(folders))
    if last := summary.last_started:
        nodes = count(len(last.nodes) or 1, "node")
        yield "ran as", f"{last.strategy}, {count(last.processes, 'rank')} on {nodes}"
    yield from _speed(summary)


def _speed(summary: RunSummary) -> Iterator[tuple[str, str]]:
    values = {name: series.finite.values for name, series in summary.curves.items()}
    values = {name: finite for name, finite in values.items() if len(finite)}
    last = summary.last_started
    plan = last.planned if last else None
    if "tokens_per_s" in values:
        beside = f", planned {plan.tokens_s:,.0f}" if plan else ""
        yield "throughput", f"{np.median(values['tokens_per_s']):,.0f} tokens/s (median){beside}"
    if plan and last and last.first_step and last.last_step:
        seconds = last.trained_s / (last.last_step - last.first_step + 1)
        yield "a step", f"{seconds:.2f} s (the last attempt's mean), planned {plan.step_s:.2f}"
    if "mfu" in values:
        yield "MFU", f"{np.median(values['mfu']):.1%} (median)"
    if "peak_memory_gb" in values:
        beside = f", planned {plan.memory / 1e9:.2f}" if plan and plan.memory else ""
        yield "peak memory", f"{values['peak_memory_gb'].max():.2f} GB on the first rank{beside}"


def notes(summary: RunSummary) -> Iterator[str]:
    """Yield what a reader should know: unread files, rows left out, doubtful curves, steps trained again."""
    yield from summary.unread
    if facts := summary.facts:
        yield from facts.notes
        if facts.bad_rows:
            name = summary.run.bad_rows.name
            yield f"{facts.bad_rows:,} rows could not be used and are left out: {name}"
    yield from _doubtful_curves(summary)
    if again := sum(attempt.steps_repeated or 0 for attempt in summary.attempts):
        yield f"{again:,} steps were trained again after a restart: they had not been saved"
    if inside := [seconds for _, seconds in inside_job(summary.attempts) if seconds is not None]:
        times = count(len(inside), "time")
        yield f"it went on inside its job {times}; until the first step at most {max(inside):.1f} s"
    if paces := summary.run.read_paces():
        yield from paces.slow
    if (summary.code.git or "").endswith("-dirty"):
        yield f"the code had changes that are not in its commit: {summary.run.diff.name}"


def _doubtful_curves(summary: RunSummary) -> Iterator[str]:
    for name in CHECKED_CURVES:
        if name in summary.curves and len(steps := summary.curves[name].not_finite):
            yield f"{name} is not finite {len(steps):,} times, first at step {steps[0]:,}"
    evaluation = summary.curves.get("eval_loss")
    if evaluation and (lowest := evaluation.lowest) and evaluation.values[-1] > lowest[1] * 1.01:
        step, loss = lowest
        there = "is there" if summary.run.checkpoint(step).is_dir() else "is not there"
        yield (
            f"the evaluation loss has risen since step {step:,}, from {number(loss)} to"
            f" {number(evaluation.values[-1])}; checkpoint-{step} {there}"
        )


def legend(summary: RunSummary) -> str:
    """Return the meaning of the marks on the curves."""
    parts = []
    if "loss" in summary.curves and len(summary.curves["loss"].steps) > curves.FEW:
        parts.append("Faint: as logged; strong: the running median.")
    if again := curves.restarts(summary.attempts):
        shaded = "; shaded: steps that it trained again" * any(attempt.steps_repeated for attempt in again)
        parts.append(f"Dashed: where another attempt went on{shaded}.")
        parts.append("In the steps over time, shaded: nothing ran.")
    logged = [summary.curves[name] for name in ("loss", "grad_norm") if name in summary.curves]
    if any(len(series.not_finite) for series in logged):
        parts.append("Crosses: not a finite number.")
    return " ".join(parts)


def wandb(summary: RunSummary) -> Wandb:
    """Return the run's id and addresses at W&B, as far as they are known."""
    id_file, url_file = summary.run.wandb_id, summary.run.wandb_url
    run = url = sync = ""
    if id_file.is_file():
        project = summary.settings.get("log.wandb_project")
        where = f" in project {project}" if project else ""
        run = f"{id_file.read_text(errors='replace').strip()}{where}"
    if url_file.is_file():
        text = url_file.read_text(errors="replace").strip()
        url = text if re.fullmatch(r"https?://\S+", text) else ""
    if any(not any(path.glob("*.synced")) for path in id_file.parent.glob("offline-run-*")):
        sync = f"wandb sync {shlex.quote(summary.name)}/wandb/offline-run-*"
    return Wandb(url, run, sync)


def rank_table(summary: RunSummary) -> list[dict[str, str]]:
    """Return the ranks as rows {column: cell}, the slowest first; not all of many."""
    paces = summary.run.read_paces()
    if paces is None or not paces.usual:
        return []
    ranks = sorted(range(len(paces.seconds)), key=lambda rank: -paces.seconds[rank])
    shown = ranks if len(ranks) <= RANKS else [*ranks[: RANKS - 1], ranks[-1]]
    return [
        {
            "rank": str(rank),
            "node": paces.hosts[rank],
            "own time of a step": f"{1e3 * paces.seconds[rank]:,.1f} ms",
            "of the median": f"{paces.seconds[rank] / paces.usual:.2f}",
        }
        for rank in shown
    ]


def attempt_table(summary: RunSummary) -> list[dict[str, str]]:
    """Return the attempts as rows {column: cell}, without columns that are empty."""
    rows = [_row(attempt, summary.state) for attempt in summary.attempts]
    return [{name: cell for name, cell in row.items() if any(other[name] for other in rows)} for row in rows]


def _row(attempt: Attempt, state: str) -> dict[str, str]:
    first, last, took = attempt.first_step, attempt.last_step, _seconds_of(attempt)
    why = ": ".join(filter(None, [attempt.cause_in_words, attempt.message]))
    return {
        "#": str(attempt.attempt),
        "start (UTC)": f"{attempt.start:%m-%d %H:%M}",
        "took": duration(took) if took is not None else "",
        "ended": attempt.reason or state,
        "from": (attempt.resumed_from or "").removeprefix("checkpoint-"),
        "steps": f"{first:,} to {last:,}" if first and last is not None else "",
        "again": f"{attempt.steps_repeated:,}" if attempt.steps_repeated else "",
        "ranks": str(attempt.processes),
        "nodes": str(len(attempt.nodes) or 1),
        "job": attempt.job_id or "",
        "start took": f"{attempt.restart_s:.1f} s" if attempt.restart_s is not None else "",
        "why": short(" ".join(why.split()), 400),
    }


def _seconds_of(attempt: Attempt) -> float | None:
    return (attempt.end - attempt.start).total_seconds() if attempt.end else None
