"""`qwenlora runs [DIR]`: the runs of a folder, how far each is, and with what it was made.

`read` takes a run folder in whatever state it is; diff.py compares two. Nothing is written, and a file that
cannot be read is one of the things that are said.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qwenlora.configs import Config, load_config
from qwenlora.configs.load import FIELDS, differences
from qwenlora.jobs import ledger
from qwenlora.jobs.find import Found, newest_job
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Attempt, Code, Facts, SideCounts, SideName, now

ALWAYS = ("model.name_or_path", "data.train", "lora.r", "train.learning_rate")  # shown of every run
# no version of a run differs from another by these
ASIDE = ("run_dir", "log.", "launch.", "checkpoint.", "data.num_proc", "data.cache_dir")
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # the folder is a run, holds runs, sweeps, or a folder of these
_MARKS = ("config.yaml", "attempts.jsonl")
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Version:
    """A run, as what is known of it. config: None where it cannot be read. loss, evaluated: lines of
    metrics.jsonl.

    facts, code, compared: None without the file. flaws: what cannot be read, and why.
    """

    run: RunFolder
    config: Config | None
    attempts: list[Attempt]
    facts: Facts | None
    code: Code | None
    loss: dict[str, float]
    evaluated: dict[str, float]
    compared: Comparison | None
    step: int
    flaws: list[str]

    @property
    def name(self) -> str:
        """The folder's name, as it can be shown."""
        return printable(self.run.path.name)

    @property
    def state(self) -> str:
        """Return done, stopped, failed, killed, refused, running, waiting, not started, or unknown."""
        tried = [one for one in self.attempts if one.reason != "refused"] or self.attempts
        if tried and tried[-1].reason not in (None, "stopped"):
            return str(tried[-1].reason)
        found = Found(self.run, newest_job(self.run))
        job = found.job()
        if job and job.state == "PENDING":
            return "waiting"
        if not tried:
            return "waiting" if found.alive() else "unknown" if self.run.trained else "not started"
        if tried[-1].reason:
            return "stopped"
        return "killed" if self.run.abandoned or (job and not found.alive()) else "running"

    @property
    def seen(self) -> float:
        """When it last gave a sign, in seconds since 1970."""
        if self.attempts and self.attempts[-1].end:
            return self.attempts[-1].end.timestamp()
        files = (self.run.history.progress.path, self.run.history.file, self.run.config, self.run.submitted)
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    @property
    def adapter_bytes(self) -> int | None:
        """The size of the final adapter; None before it is there."""
        file = self.run.adapter / "adapter_model.safetensors"
        return file.stat().st_size if file.is_file() else None

    def counts(self, side: SideName) -> SideCounts | None:
        """Return what was counted of the training or the evaluation rows; None where that is not known."""
        return self.facts.data.get(side) if self.facts else None


def read(run: RunFolder) -> Version:
    """Return what is known of a run. Raises: ValueError for a folder that holds none."""
    if not is_run(run.path):
        if is_run(run.path.parent):
            raise ValueError(f"{run.path} is part of the run {run.path.parent}; name the run")
        raise ValueError(
            f"{run.path} holds no run: it has no config.yaml with code.json; name a run folder, such as"
            " runs/tiny"
        )
    flaws: list[str] = []

    def tried(file: Path, how: Callable[[], _Read], otherwise: _Read, *, needed: bool = False) -> _Read:
        try:
            if file.exists() or needed:
                return how()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            flaws.append(f"{file.name} cannot be read: {why}")
        return otherwise

    nothing: dict[str, float] = {}
    waits = _is_submitted(run) and not run.path.exists()
    return Version(
        run,
        tried(run.config, lambda: load_config(run.config), None, needed=not waits),
        tried(run.history.file, run.history.attempts, list[Attempt](), needed=run.trained),
        tried(run.facts, run.read_facts, None),
        tried(run.code, lambda: Code.read(run.code), None),
        tried(run.metrics, lambda: last_line(run.metrics, "loss") or nothing, nothing),
        tried(run.metrics, lambda: _evaluated(run.metrics), nothing),
        tried(run.comparison, lambda: Comparison.read(run.comparison), None),
        tried(run.history.file, run.history.last_step, 0),
        list(dict.fromkeys(flaws)),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or will be a submitted one's."""
    marked = all((folder / name).is_file() for name in ("config.yaml", "code.json"))
    return marked or (folder / "attempts.jsonl").is_file() or _is_submitted(RunFolder(folder))


def _is_submitted(run: RunFolder) -> bool:
    return (run.submitted / "jobs.jsonl").is_file() and not ledger.sweep_runs(run)


def below(folder: Path) -> list[Version]:
    """Return the runs in a folder and in those in it, the one first that gave a sign least recently."""
    folder = folder.absolute()
    found = {file.parent for depth in _DEPTHS for name in _MARKS for file in folder.glob(f"{depth}{name}")}
    submitted = {file.parent for depth in _DEPTHS for file in folder.glob(f"{depth}.submitted/*/jobs.jsonl")}
    found |= {path.parents[1] / path.name for path in submitted}
    visible = [
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    runs = [read(RunFolder(path)) for path in visible if is_run(path)]
    return sorted(runs, key=lambda version: (version.seen, version.name))


def show(folder: Path, console: Console) -> int:
    """Print the runs of a folder, the newest last: how far they are, what made them, what is wrong with them.

    Returns: the exit code. Raises: ValueError when there is no such folder.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder} (looked in {Path.cwd()}); name the one that holds your run folders,"
            " or make a run: qwenlora train my.yaml"
        )
    versions = below(folder)
    if not versions:
        console.print(
            f"no runs in {folder}; `qwenlora train my.yaml` makes one, `qwenlora runs DIR` looks elsewhere",
            soft_wrap=True,
        )
        return 0
    names = [_name(version, folder.absolute()) for version in versions]
    console.print(_progress(versions, names))
    console.print()
    for part in _settings(versions, names):
        console.print(part)
    for name, version in zip(names, versions, strict=True):
        if re.fullmatch(r".+\.old-\d+", version.run.path.name):
            console.print(f"{name}: set aside by --fresh", soft_wrap=True, style="dim")
        for flaw in version.flaws:
            console.print(f"{name}: {printable(flaw)}", soft_wrap=True, style="yellow")
    return 0


def _name(version: Version, folder: Path) -> str:
    """Return a run's name from the folder that is listed."""
    path = version.run.path.relative_to(folder)
    return printable(str(path)) if path.parts else version.name


def _progress(versions: list[Version], names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    for column in ("step", "loss", "eval loss", "rows", "adapter", "ago"):
        table.add_column(column, no_wrap=True, justify="right")
    for name, version in zip(names, versions, strict=True):
        size, counts = version.adapter_bytes, version.counts("train")
        table.add_row(
            name,
            version.state,
            f"{version.step:,}",
            digits(version.loss.get("loss")),
            digits(version.evaluated.get("eval_loss")),
            digits(counts.rows if counts else None),
            f"{size / 1e6:,.1f} MB" if size is not None else "-",
            ago(now().timestamp() - version.seen),
        )
    return table


def _settings(versions: list[Version], names: list[str]) -> Iterator[RenderableType]:
    """Yield what all were made with, and a table of what differs."""
    known = [(name, version.config) for name, version in zip(names, versions, strict=True) if version.config]
    if not known:
        return
    first = known[0][1]
    differing = {
        key for _, config in known for key in differences(first, config) if not key.startswith(ASIDE)
    }
    all_of = f"all {len(known)}: " if len(known) > 1 else ""
    if alike := [key for key in ALWAYS if key not in differing]:
        yield Text(all_of + _said(first, alike), style="dim")
    if differing:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("run", overflow="fold", min_width=8, max_width=30)
        table.add_column("settings that differ", overflow="fold")
        for name, config in known:
            table.add_row(name, _said(config, [key for key in FIELDS if key in differing]))
        yield table


def _said(config: Config, keys: list[str]) -> str:
    values = settings(config)
    return "  ".join(f"{key}={as_yaml(values[key])}" for key in keys)


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted key: plain value} of a config; of a source of rows, what is said of it."""
    tree = config.model_dump(mode="json", by_alias=True)
    sides: dict[str, Any] = {
        f"data.{side}": value
        for side, value in config.data.model_dump(
            include={"train", "eval"}, exclude_defaults=True, mode="json"
        ).items()
    }
    flat = {key: _at(tree, key) for key in FIELDS}
    return flat | sides


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def as_yaml(value: Any) -> str:
    """Return a plain value as YAML has it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return printable(text.removesuffix("\n...\n").strip())


def digits(value: Any) -> str:
    """Return a number with the four digits that matter, whole ones whole; - for none."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def ago(seconds: float) -> str:
    """Return how long ago something was."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def printable(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _evaluated(metrics: Path) -> dict[str, float]:
    """Return the last evaluation, which may lie far from the end."""
    with metrics.open("rb") as lines:
        found = [line for line in lines if b'"eval_loss"' in line]
    return next(filter(None, map(_line, reversed(found))), {})


def _line(line: bytes) -> dict[str, float]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):  # half a line
        return {}
