"""The files of a run, read in any state of the run, for reports and model cards: `summarise_run(run)`."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qwenlora.adapter.publish.series import Series, read_curves
from qwenlora.data.order import total_steps
from qwenlora.jobs.find import state_now
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import duration, number, short
from qwenlora.run.records import Attempt, Code, Facts, now
from qwenlora.run.state import RunState

BAD_ROWS = 20  # lines of bad_rows.txt
COUNTS = {  # {field of SideCounts: its name on the page}
    "read_rows": "rows read",
    "duplicates": "of these repeated",
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
LORA_SETTINGS = (
    *("lora.r", "lora.lora_alpha", "lora.rank_pattern", "lora.alpha_pattern", "lora.lora_dropout"),
    *("lora.target_modules", "lora.experts", "lora.target_parameters", "lora.exclude_modules"),
    *(
        "lora.layers_to_transform",
        "lora.modules_to_save",
        "lora.trainable_token_indices",
        "lora.init_lora_weights",
        "lora.use_rslora",
    ),
    *("lora.use_dora", "lora.init_from"),
)
OPTIMIZER_SETTINGS = (
    *("train.learning_rate", "train.loraplus_lr_ratio", "train.lr_scheduler_type", "train.warmup_steps"),
    *("train.optim", "train.weight_decay"),
)
NOT_SHOWN: tuple[Any, ...] = (None, False, {})  # values of settings
Settings = dict[str, Any]  # a config as {"lora.r": 32 ...}
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class RunSummary:
    """The contents of a run's folder. config: the text of config.yaml; settings: its values.

    attempts: an unfinished last attempt gets its latest step as its end. facts is None, and code empty,
    without their files. unread: files that cannot be read, and why.
    """

    run: RunFolder
    config: str
    settings: Settings
    attempts: list[Attempt]
    state: RunState
    facts: Facts | None
    code: Code
    curves: dict[str, Series]
    comparison: Comparison | None
    bad_rows: list[str]
    unread: list[str]

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.run.path.name

    @property
    def last_attempt(self) -> Attempt | None:
        """The last attempt that was not refused; the last of all if all were."""
        tried = [attempt for attempt in self.attempts if attempt.reason != "refused"] or self.attempts
        return tried[-1] if tried else None

    @property
    def last_started(self) -> Attempt | None:
        """The last attempt that came as far as choosing a strategy."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.strategy), None)

    @property
    def planned_steps(self) -> int | None:
        """The number of steps that the run will have; None if it is not known."""
        steps: int | None = self.settings.get("train.max_steps")
        units = self.facts.units if self.facts else 0
        batch, epochs = (
            self.settings.get(f"train.{key}") for key in ("global_batch_size", "num_train_epochs")
        )
        return steps if steps or not (units and batch and epochs) else total_steps(units, batch, epochs, None)

    def last_value(self, name: str) -> float | None:
        """Return the last value of a curve; None without the curve."""
        return float(self.curves[name].values[-1]) if name in self.curves else None

    @property
    def counts(self) -> list[tuple[str, list[str]]]:
        """(name, the count of each side) of the rows, without counts that are all zero."""
        if not self.facts:
            return []
        sides = self.facts.data.values()
        counts = {name: [getattr(side, key) for side in sides] for key, name in COUNTS.items()}
        if not self.facts.packing:
            del counts[COUNTS["packs"]]
        return [(name, list(map(number, values))) for name, values in counts.items() if any(values)]

    @property
    def newest_adapter(self) -> str:
        """RUN/adapter, or before the run's end its last checkpoint; empty without any."""
        folders = [self.run.adapter] if self.run.adapter.is_dir() else self.run.checkpoints()[:1]
        return f"{self.name}/{folders[0].name}" if folders else ""


def summarise_run(run: RunFolder) -> RunSummary:
    """Return the contents of a run's folder. Raises: ValueError when it holds no run."""
    if not run.config.is_file():
        raise ValueError(
            f"{run.path} holds no run: config.yaml is not there; name a run folder, such as runs/tiny"
        )
    unread: list[str] = []

    def tried(file: Path, read: Callable[[], _Value], default: _Value) -> _Value:
        try:
            return read()
        except FileNotFoundError:
            return default
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            unread.append(f"{file.name} cannot be read: {reason}")
            return default

    config = tried(run.config, lambda: run.config.read_text(encoding="utf-8"), "")
    return RunSummary(
        run,
        config,
        tried(run.config, lambda: _flat(yaml.safe_load(config)), Settings()),
        *tried(run.history.file, lambda: _attempts(run), (list[Attempt](), "unknown")),
        tried(run.facts, run.read_facts, None),
        tried(run.code, lambda: Code.read(run.code), Code()),
        tried(run.metrics, lambda: read_curves(run.metrics), dict[str, Series]()),
        tried(run.comparison, lambda: Comparison.read(run.comparison), None),
        tried(run.bad_rows, lambda: _first_lines(run.bad_rows), list[str]()),
        unread,
    )


def _attempts(run: RunFolder) -> tuple[list[Attempt], RunState]:
    """Return the attempts, an unfinished last one with its latest step as its end, and the run's state."""
    attempts = run.history.attempts()
    if not attempts or attempts[-1].end:
        return attempts, state_now(run, attempts)
    *before, last = attempts
    if progress := run.history.progress.read(last.attempt):
        end = datetime.fromtimestamp(progress.time, UTC)
        message = f"step {progress.step:,} was done {duration(max((now() - end).total_seconds(), 0.0))} ago"
        last = last.revised(end=end, message=message, last_step=progress.step, trained_s=progress.trained_s)
    return [*before, last], state_now(run, attempts)


def _first_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return [short(line.rstrip("\n"), 300) for line in islice(lines, BAD_ROWS)]


def _flat(tree: Settings, prefix: str = "") -> Settings:
    """Return a config's sections as {"lora.r": 32 ...}, whichever version of qwenlora wrote it."""
    settings: Settings = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            settings |= _flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings
