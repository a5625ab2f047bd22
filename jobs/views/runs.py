"""`qwenlora runs [DIR]`: the runs of a folder, how far each is, and the settings it was made with."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qwenlora.configs import Config
from qwenlora.configs.keys import FIELDS, differences
from qwenlora.jobs.views.overview import RunOverview, is_run, read_overview, settings
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import ago, as_yaml, number, printable, size

ALWAYS = ("model.name_or_path", "data.train", "lora.r", "train.learning_rate")  # shown of every run
# not shown: runs that differ in these alone were made the same way
NOT_SHOWN = ("run_dir", "log.", "launch.", "checkpoint.", "data.num_proc", "data.cache_dir")
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # the folder is a run, holds runs, sweeps, or a folder of these
_FILES_OF_A_RUN = ("config.yaml", "attempts.jsonl")


def show_runs(folder: Path, console: Console) -> int:
    """Print a folder's runs, the newest last; return the exit code. Raises: ValueError without the folder."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder} (looked in {Path.cwd()}); name the one that holds your run folders,"
            " or make a run: qwenlora train my.yaml"
        )
    runs = runs_below(folder)
    if not runs:
        console.print(
            f"no runs in {folder}; `qwenlora train my.yaml` makes one, `qwenlora runs DIR` looks elsewhere",
            soft_wrap=True,
        )
        return 0
    names = [_name(run, folder.absolute()) for run in runs]
    console.print(_progress_table(runs, names))
    console.print()
    for part in _settings(runs, names):
        console.print(part)
    for name, run in zip(names, runs, strict=True):
        if re.fullmatch(r".+\.old-\d+", run.run.path.name):
            console.print(f"{name}: set aside by --fresh", soft_wrap=True, style="dim")
        for flaw in run.flaws:
            console.print(f"{name}: {printable(flaw)}", soft_wrap=True, style="yellow")
    return 0


def runs_below(folder: Path) -> list[RunOverview]:
    """Return the runs in a folder and in its subfolders, by their last sign of life."""
    runs = [read_overview(run) for run in run_folders(folder)]
    return sorted(runs, key=lambda run: (run.last_sign, run.name))


def run_folders(folder: Path) -> list[RunFolder]:
    """Return the run folders in a folder and in its subfolders, and those of submitted runs."""
    folder = folder.absolute()
    paths = {
        file.parent for depth in _DEPTHS for name in _FILES_OF_A_RUN for file in folder.glob(f"{depth}{name}")
    }
    submitted = {file.parent for depth in _DEPTHS for file in folder.glob(f"{depth}.submitted/*/jobs.jsonl")}
    paths |= {path.parents[1] / path.name for path in submitted}
    return [RunFolder(path) for path in paths if _is_visible(path, folder) and is_run(path)]


def _is_visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _name(run: RunOverview, folder: Path) -> str:
    """Return a run's path from the folder that is listed."""
    path = run.run.path.relative_to(folder)
    return printable(str(path)) if path.parts else run.name


def _progress_table(runs: list[RunOverview], names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    for column in ("step", "loss", "eval loss", "rows", "adapter", "ago"):
        table.add_column(column, no_wrap=True, justify="right")
    for name, run in zip(names, runs, strict=True):
        adapter, counts = run.adapter_bytes, run.counts("train")
        table.add_row(
            name,
            run.state,
            f"{run.step:,}",
            number(run.loss.get("loss")),
            number(run.evaluated.get("eval_loss")),
            number(counts.rows if counts else None),
            "-" if adapter is None else size(adapter),
            ago(time.time() - run.last_sign),
        )
    return table


def _settings(runs: list[RunOverview], names: list[str]) -> Iterator[RenderableType]:
    """Yield a line of the settings that all runs share, and a table of those in which they differ."""
    configs = [(name, run.config) for name, run in zip(names, runs, strict=True) if run.config]
    if not configs:
        return
    first = configs[0][1]
    differing = _differing([config for _, config in configs])
    if alike := [key for key in ALWAYS if key not in differing]:
        all_of_them = f"all {len(configs)}: " if len(configs) > 1 else ""
        yield Text(all_of_them + _as_line(first, alike), style="dim")
    if differing:
        yield _settings_table(configs, [key for key in FIELDS if key in differing])


def _settings_table(configs: list[tuple[str, Config]], keys: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", min_width=8, max_width=30)
    table.add_column("settings that differ", overflow="fold")
    for name, config in configs:
        table.add_row(name, _as_line(config, keys))
    return table


def _differing(configs: list[Config]) -> set[str]:
    """Return the keys in which configs differ, without those that are not shown."""
    keys = {key for config in configs[1:] for key in differences(configs[0], config)}
    return {key for key in keys if not key.startswith(NOT_SHOWN)}


def _as_line(config: Config, keys: list[str]) -> str:
    """Return settings on a line, without those that are not set."""
    values = settings(config)
    return "  ".join(f"{key}={as_yaml(values[key])}" for key in keys if values[key] not in (None, {}))
