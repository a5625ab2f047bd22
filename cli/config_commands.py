"""`qwenlora config show`, `qwenlora config from` and `qwenlora config schema`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import ConfigFile, Overrides
from qwenlora.configs import Config, load_config
from qwenlora.configs.convert import convert
from qwenlora.configs.load import to_yaml


def show(config: ConfigFile, overrides: Overrides = None) -> int:
    """Print the resolved config: defaults < CONFIG < overrides."""
    print(to_yaml(load_config(config, overrides or [])), end="")
    return 0


def from_(
    file: Annotated[Path, typer.Argument(help="A config, a script or a dataset_info.json of theirs.")],
) -> int:
    """Print the config nearest to one of LLaMA-Factory, ms-swift or Axolotl; comments say what differs."""
    text = convert(file)
    print(text, end="")
    if not sys.stdout.isatty():  # else it is on the screen already
        print(
            "".join(line for line in text.splitlines(keepends=True) if line[0] == "#"),
            end="",
            file=sys.stderr,
        )
    return 0


def schema() -> int:
    """Print the JSON Schema of a config, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False))
    return 0
