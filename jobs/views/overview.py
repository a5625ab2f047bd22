"""What is known of a run, for `qwenlora runs` and `diff`. A file that cannot be read is noted as a flaw."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwenlora.configs import Config, load_config
from qwenlora.configs.keys import FIELDS
from qwenlora.jobs import ledger
from qwenlora.jobs.find import last_sign, state_now
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import printable
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Attempt, Code, Facts, SideCounts, SideName
from qwenlora.run.state import RunState

_Content = TypeVar("_Content")


@dataclass(frozen=True)
class RunOverview:
    """What is known of a run. config, facts, code, compared: None where the file is missing or damaged; loss,
    evaluated: the last lines with these in metrics.jsonl; flaws: which files cannot be read, and why."""

    run: RunFolder
    config: Config | None
    attempts: list[Attempt]
    facts: Facts | None
    code: Code | None
    loss: dict[str, float]
    evaluated: dict[str, float]
    compared: Comparison | None
    flaws: list[str]

    @property
    def name(self) -> str:
        """The folder's name, as it can be shown."""
        return printable(self.run.path.name)

    @property
    def state(self) -> RunState:
        """The state of the run now, after asking Slurm."""
        return state_now(self.run, self.attempts)

    @property
    def step(self) -> int:
        """The last step that any attempt trained."""
        return self.run.history.last_step() if self.attempts else 0

    @property
    def last_sign(self) -> float:
        """When the run ended, else last wrote to its folder, in seconds since 1970."""
        end = self.attempts[-1].end if self.attempts else None
        return end.timestamp() if end else last_sign(self.run)

    @property
    def adapter_bytes(self) -> int | None:
        """The size of the final adapter; None before it is there."""
        file = self.run.adapter / "adapter_model.safetensors"
        return file.stat().st_size if file.is_file() else None

    def counts(self, side: SideName) -> SideCounts | None:
        """Return the counts of the training or evaluation rows; None where they are not known."""
        return self.facts.data.get(side) if self.facts else None


@dataclass
class LenientReader:
    """Reads files that may be missing or damaged. flaws: which could not be read, and why."""

    flaws: list[str] = field(default_factory=list)

    def read(
        self, file: Path, read: Callable[[], _Content], default: _Content, *, required: bool = False
    ) -> _Content:
        """Return what read() returns, or the default. required: a missing file is a flaw, too."""
        try:
            return read() if file.exists() or required else default
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            self.flaws.append(f"{file.name} cannot be read: {why}")
        return default


def read_overview(run: RunFolder) -> RunOverview:
    """Return what is known of a run. Raises: ValueError for a folder that holds none."""
    if not is_run(run.path):
        if is_run(run.path.parent):
            raise ValueError(f"{run.path} is part of the run {run.path.parent}; name the run")
        raise ValueError(
            f"{run.path} holds no run: it has no config.yaml with code.json; name a run folder, such as"
            " runs/tiny"
        )
    reader = LenientReader()
    not_begun = _is_submitted(run) and not run.path.exists()
    nothing: dict[str, float] = {}
    return RunOverview(
        run,
        reader.read(run.config, lambda: load_config(run.config), None, required=not not_begun),
        reader.read(run.history.file, run.history.attempts, list[Attempt](), required=run.trained),
        reader.read(run.facts, run.read_facts, None),
        reader.read(run.code, lambda: Code.read(run.code), None),
        reader.read(run.metrics, lambda: last_line(run.metrics, "loss") or nothing, nothing),
        reader.read(run.metrics, lambda: _last_evaluation(run.metrics), nothing),
        reader.read(run.comparison, lambda: Comparison.read(run.comparison), None),
        list(dict.fromkeys(reader.flaws)),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or will be that of a submitted run."""
    written = all((folder / name).is_file() for name in ("config.yaml", "code.json"))
    return written or (folder / "attempts.jsonl").is_file() or _is_submitted(RunFolder(folder))


def _is_submitted(run: RunFolder) -> bool:
    return (run.submitted / "jobs.jsonl").is_file() and not ledger.sweep_runs(run)


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted key: plain value} of a config; of a source of rows, only what was set."""
    tree = config.model_dump(mode="json", by_alias=True)
    rows = config.data.model_dump(include={"train", "eval"}, exclude_defaults=True, mode="json")
    return {key: _value_at(tree, key) for key in FIELDS} | {
        f"data.{side}": value for side, value in rows.items()
    }


def _value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _last_evaluation(metrics: Path) -> dict[str, float]:
    """Return the last line with an evaluation, which may lie far from the end of the file."""
    with metrics.open("rb") as lines:
        evaluations = [line for line in lines if b'"eval_loss"' in line]
    for line in reversed(evaluations):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):  # half a line
            continue
    return {}
