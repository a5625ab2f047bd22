"""What a run left in its folder, read whatever state that is in, and what is to be said of it in numbers and
words.

`record = read(run)`; report.py puts it on a page. A file that cannot be read is one of the notes.
"""

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from qwenlora.adapter.publish import curves
from qwenlora.data.order import total_steps
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.run.history import goodput
from qwenlora.run.records import Attempt, Code, Facts, now

BAD_ROWS = 20  # lines of bad_rows.txt
COUNTS = {  # what facts.json counts of the rows
    "read_rows": "rows read",
    "duplicates": "of these twice",
    "overlength": "of these over-length",
    "truncated": "truncated",
    "dropped": "dropped",
    "split": "split",
    "rows": "rows used",
    "packs": "packs",
    "tokens": "tokens",
    "trained_tokens": "tokens trained on",
    "lost_replies": "replies not trained on",
    "longest": "longest row, in tokens",
}
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Record:
    """config: as text; settings: the same as {"lora.r": 32 ...}; facts: None without the file.

    attempts: the last one, if nobody has said how it ended, as far as it came. unfinished: the state of that
    one.
    curves: of metrics.jsonl.
    unread: what could not be read, and why.
    """

    run: RunFolder
    config: str
    settings: dict[str, Any]
    attempts: list[Attempt]
    unfinished: str
    facts: Facts | None
    code: Code
    curves: dict[str, curves.Series]
    compared: Comparison | None
    bad_rows: list[str]
    unread: list[str]

    @property
    def state(self) -> tuple[str, str, str]:
        """Return (done, stopped, failed, killed, refused, running ..., what was said of that, when it
        ended)."""
        tried = [attempt for attempt in self.attempts if attempt.reason != "refused"] or self.attempts
        if not tried:
            return "unknown" if self.run.trained else "not started", "", ""
        last = tried[-1]
        return (
            last.reason or self.unfinished,
            last.message,
            f"{last.end:%Y-%m-%d %H:%M} UTC" if last.end else "",
        )

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        """(what, number, remark) for the numbers that one looks for first."""
        steps = [attempt.last_step or 0 for attempt in self.attempts]
        steps += [int(series.steps[-1]) for series in self.curves.values()]
        remarks = [f"of {self._planned:,}"] if self._planned else []
        if (epochs := self._last("epoch")) is not None:
            remarks.append(f"{number(epochs)} epochs")
        tiles = [("steps", f"{max(steps, default=0):,}", ", ".join(remarks))]
        if (loss := self._last("loss")) is not None:
            tiles.append(("training loss", number(loss), "as last logged"))
        if (loss := self._last("eval_loss")) is not None:
            last, lowest = int(self.curves["eval_loss"].steps[-1]), self.curves["eval_loss"].lowest
            beside = f"; lowest {number(lowest[1])} at {lowest[0]:,}" if lowest and lowest[0] != last else ""
            tiles.append(("evaluation loss", number(loss), f"at step {last:,}{beside}"))
            tiles.append(
                ("perplexity", number(math.exp(loss) if loss < 700 else math.inf), "of the evaluation rows")
            )
        took = sum(filter(None, map(_took, self.attempts)), timedelta())
        many = f"{len(self.attempts)} attempt{'s' * (len(self.attempts) != 1)}"
        tiles.append(("time", _duration(took), f"in {many}"))
        if (share := goodput(self.attempts)) is not None:
            tiles.append(("goodput", f"{share:.0%}", "of it in steps that were kept"))
        return tiles

    @property
    def _planned(self) -> int | None:
        """How many steps the run is to have."""
        units = self.facts and self.facts.units
        steps: int | None = self.settings.get("train.max_steps")
        batch, epochs = (
            self.settings.get(f"train.{key}") for key in ("global_batch_size", "num_train_epochs")
        )
        return steps if steps or not (units and batch and epochs) else total_steps(units, batch, epochs, None)

    def _last(self, name: str) -> float | None:
        return float(self.curves[name].values[-1]) if name in self.curves else None

    @property
    def about(self) -> list[tuple[str, str]]:
        """(name, value) lines on the model, the adapter and the machine."""
        revision = self.settings.get("model.revision")
        base = f"{self.settings.get('model.name_or_path', '-')}{f', revision {revision}' if revision else ''}"
        lines = [("base model", base)]
        if self.facts:
            trainable, total = self.facts.parameters.trainable, self.facts.parameters.total
            share = trainable / max(trainable + total, 1)
            lines.append(
                ("trained", f"{trainable:,} parameters beside the base's {total:,} ({share:.2%} of all)")
            )
        weights = self.run.adapter / "adapter_model.safetensors"
        lines.append(
            ("adapter", f"{weights.stat().st_size / 1e6:,.1f} MB" if weights.is_file() else "not there yet")
        )
        if folders := self.run.checkpoints():
            lines.append(("checkpoints", ", ".join(f"{step_of(folder):,}" for folder in reversed(folders))))
        if last := next((attempt for attempt in reversed(self.attempts) if attempt.strategy), None):
            nodes, ranks = len(last.nodes) or 1, last.processes
            many = f"{ranks} rank{'s' * (ranks != 1)} on {nodes} node{'s' * (nodes != 1)}"
            lines.append(("ran as", f"{last.strategy}, {many}"))
        for name, key, form in (
            ("throughput", "tokens_per_s", "{:,.0f} tokens/s (median)"),
            ("MFU", "mfu", "{:.1%} (median)"),
        ):
            if key in self.curves and len(values := self.curves[key].finite.values):
                lines.append((name, form.format(np.median(values))))
        if "peak_memory_gb" in self.curves and len(values := self.curves["peak_memory_gb"].finite.values):
            lines.append(("peak memory", f"{values.max():.2f} GB on the first rank"))
        return lines

    @property
    def notes(self) -> list[str]:
        """What a careful colleague would mention of the run."""
        notes = [*self.unread, *(self.facts.notes if self.facts else ())]
        if self.facts and self.facts.bad_rows:
            notes.append(
                f"{self.facts.bad_rows:,} rows could not be used and are left out: {self.run.bad_rows.name}"
            )
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in self.curves and len(lost := self.curves[name].not_finite):
                notes.append(f"{name} is not finite {len(lost):,} times, first at step {lost[0]:,}")
        evaluation = self.curves.get("eval_loss")
        if evaluation and (lowest := evaluation.lowest) and evaluation.values[-1] > lowest[1] * 1.01:
            kept = "is there" if self.run.checkpoint(lowest[0]).is_dir() else "is not there"
            notes.append(
                f"the evaluation loss has risen since step {lowest[0]:,}, from {number(lowest[1])} to"
                f" {number(evaluation.values[-1])}; checkpoint-{lowest[0]} {kept}"
            )
        if again := sum(attempt.steps_repeated or 0 for attempt in self.attempts):
            notes.append(f"{again:,} steps were trained again after a restart: they had not been saved")
        if (self.code.git or "").endswith("-dirty"):
            notes.append(f"the code had changes that are not in its commit: {self.run.diff.name}")
        return notes

    @property
    def legend(self) -> str:
        """What the marks on the curves mean."""
        parts = []
        if "loss" in self.curves and len(self.curves["loss"].steps) > curves.FEW:
            parts.append("Faint: as logged; strong: the running median.")
        if again := curves.restarts(self.attempts):
            repeated = any(attempt.steps_repeated for attempt in again)
            parts.append(
                f"Dashed: where another attempt went on{'; shaded: steps that it trained again' * repeated}."
            )
            parts.append("In the steps over time, shaded: nothing ran.")
        if any(len(self.curves[name].not_finite) for name in ("loss", "grad_norm") if name in self.curves):
            parts.append("Crosses: not a finite number.")
        return " ".join(parts)

    @property
    def wandb(self) -> dict[str, str]:
        """What is known of the run at W&B: {"url", "id", "sync": a command}; empty texts where there is
        nothing."""
        folder, url = self.run.wandb_id.parent, self.run.wandb_url
        known = dict.fromkeys(("url", "id", "sync"), "")
        if self.run.wandb_id.is_file():
            project = self.settings.get("log.wandb_project")
            known["id"] = f"{self.run.wandb_id.read_text(errors='replace').strip()} in project {project}"
        if url.is_file() and re.fullmatch(r"https?://\S+", said := url.read_text(errors="replace").strip()):
            known["url"] = said
        if any(not any(path.glob("*.synced")) for path in folder.glob("offline-run-*")):
            known["sync"] = f"wandb sync {shlex.quote(self.run.path.name)}/wandb/offline-run-*"
        return known

    @property
    def history(self) -> list[dict[str, str]]:
        """The attempts as rows of a table, without columns that say nothing."""
        rows = [_row(attempt, self.unfinished) for attempt in self.attempts]
        return [
            {name: cell for name, cell in row.items() if any(other[name] for other in rows)} for row in rows
        ]

    @property
    def counts(self) -> list[tuple[str, list[str]]]:
        """(what, its count on each side) of the rows, but for what did not happen."""
        if not self.facts:
            return []
        sides = self.facts.data.values()
        counts = {name: [getattr(side, key) for side in sides] for key, name in COUNTS.items()}
        if not self.facts.packing:
            del counts[COUNTS["packs"]]
        return [(name, list(map(number, values))) for name, values in counts.items() if any(values)]

    @property
    def newest(self) -> str:
        """The adapter's folder, or before there is one the last checkpoint's, after the run's name; else
        empty."""
        folders = [self.run.adapter] if self.run.adapter.is_dir() else self.run.checkpoints()[:1]
        return f"{self.run.path.name}/{folders[0].name}" if folders else ""


def read(run: RunFolder) -> Record:
    """Return what a run left. Raises: ValueError for a folder that holds none."""
    if not run.config.is_file():
        raise ValueError(
            f"{run.path} holds no run: config.yaml is not there; name a run folder, such as runs/tiny"
        )
    unread: list[str] = []

    def tried(file: Path, how: Callable[[], _Read], otherwise: _Read) -> _Read:
        try:
            return how()
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            unread.append(
                f"{file.name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
            )
            return otherwise

    empty: dict[str, Any] = {}
    config = tried(run.config, lambda: run.config.read_text(encoding="utf-8"), "")
    return Record(
        run,
        config,
        tried(run.config, lambda: _flat(yaml.safe_load(config)), empty),
        *tried(run.history.file, lambda: _attempts(run), (list[Attempt](), "")),
        tried(run.facts, run.read_facts, None),
        tried(run.code, lambda: Code.read(run.code), Code()),
        tried(run.metrics, lambda: curves.read(run.metrics), dict[str, curves.Series]()),
        tried(run.comparison, lambda: Comparison.read(run.comparison), None),
        tried(run.bad_rows, lambda: _first_lines(run.bad_rows), list[str]()),
        unread,
    )


def _first_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return [short(line.rstrip("\n"), 300) for line in islice(lines, BAD_ROWS)]


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return {"lora.r": 32 ...} of a config as YAML has it: one of another version, too."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            _flat(value, f"{before}{key}.")
            if isinstance(value, dict) and value
            else {f"{before}{key}": value}
        )
    return found


def _attempts(run: RunFolder) -> tuple[list[Attempt], str]:
    """Return the attempts, the last one as far as it came, and the state of that one if it has no end."""
    attempts = run.history.attempts()
    if not attempts or attempts[-1].end:
        return attempts, ""
    *before, last = attempts
    if progress := run.history.progress.read(last.attempt):
        end = datetime.fromtimestamp(progress.time, UTC)
        ago = _duration(max(now() - end, timedelta()))
        message = f"step {progress.step:,} was done {ago} ago"
        last = last.revised(end=end, message=message, last_step=progress.step, trained_s=progress.trained_s)
    return [*before, last], "killed" if run.abandoned else "running"


def _row(attempt: Attempt, unfinished: str) -> dict[str, str]:
    first, last, took = attempt.first_step, attempt.last_step, _took(attempt)
    why = ": ".join(filter(None, [attempt.cause, attempt.message]))
    return {
        "#": str(attempt.attempt),
        "start (UTC)": f"{attempt.start:%m-%d %H:%M}",
        "took": _duration(took) if took is not None else "",
        "ended": attempt.reason or unfinished,
        "from": (attempt.resumed_from or "").removeprefix("checkpoint-"),
        "steps": f"{first:,} to {last:,}" if first and last is not None else "",
        "again": f"{attempt.steps_repeated:,}" if attempt.steps_repeated else "",
        "ranks": str(attempt.processes),
        "nodes": str(len(attempt.nodes) or 1),
        "job": attempt.job_id or "",
        "start took": f"{attempt.restart_s:.1f} s" if attempt.restart_s is not None else "",
        "why": short(" ".join(why.split()), 400),
    }


def _took(attempt: Attempt) -> timedelta | None:
    return attempt.end - attempt.start if attempt.end else None


def _duration(time: timedelta) -> str:
    """Return the two largest units that matter."""
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def number(value: float | None) -> str:
    """Return four digits that matter; whole numbers whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def short(text: str, longest: int = 2000) -> str:
    """Return at most so many characters, and how many there are more."""
    rest = len(text) - longest
    return f"{text[:longest]} ... ({rest:,} more characters)" if rest > 0 else text
