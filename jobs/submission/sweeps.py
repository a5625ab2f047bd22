"""The grid of a sweep, and the config of each of its runs."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlora.configs import Config, load_config
from qwenlora.configs.load import COMMAND_LINE
from qwenlora.configs.yaml_file import parse_yaml
from qwenlora.jobs.submission.site import Site
from qwenlora.run.folder import RunFolder

LONGEST_NAME = 200  # characters; a file's name may have 255 bytes


def configs(
    config: str | Path,
    grid: Mapping[str, Sequence[Any]],
    overrides: Mapping[str, Any] | Iterable[str],
    site: Site,
) -> tuple[RunFolder, tuple[Config, ...]]:
    """Return the sweep's folder and a config per combination, the last key fastest. Raises: ValueError."""
    _check_grid(grid)
    texts = _texts(overrides)

    def load(chosen: Mapping[str, Any]) -> Config:
        return load_config(config, [*texts, *_texts(chosen)], site.config, str(site.file))

    base = load({})
    by_name: dict[str, Config] = {}
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        name = _name(load(chosen), list(grid))
        if name in by_name:
            raise ValueError(f"grid: two runs would be called {name}; leave one of them out")
        by_name[name] = load(chosen | {"run_dir": f"{base.run_dir.rstrip('/')}/{name}"})
    return RunFolder(base.run_dir), tuple(by_name.values())


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid {key}={values!r}: expected a list of values, as [16, 32]")
        if key == "run_dir":
            raise ValueError(
                "grid run_dir: the runs of a sweep have their folders in run_dir; take it out of the grid"
            )
    if not grid:
        raise ValueError("the grid is empty: expected keys and their values, as lora.r=16,32")


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return the grid of texts like `lora.r=16,32`, whose values are YAML. Raises: ValueError."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise ValueError(f"--grid {text!r} is not key=value,value; write it like lora.r=16,32")
        if key in grid:
            raise ValueError(f"--grid {key} is given twice; put all of its values into one")
        grid[key] = parse_yaml(f"[{values}]", COMMAND_LINE)
    return grid


def _texts(overrides: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Return overrides as texts. JSON is YAML, too."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    return list(overrides)


def _name(config: Config, keys: list[str]) -> str:
    """Return the name of a run's folder, from the values in its config."""
    values: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    parts = []
    for key in keys:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        parts.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    name = re.sub(r"[^\w.=,-]+", "_", ",".join(parts), flags=re.ASCII)
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"grid: the name {name[:40]}... has {len(name)} characters, {LONGEST_NAME} is the most"
        )
    return name
