"""`qwenlora data check` and `qwenlora data preview`."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from qwenlora.adapter.deferred import Deferred
from qwenlora.cli.arguments import ConfigFile, Overrides, screen
from qwenlora.configs import Config, load_config

if TYPE_CHECKING:
    from qwenlora.trainer import data_check

    data_check_with_torch = data_check
else:
    data_check = Deferred("qwenlora.trainer.data_check", without=("torch",))
    data_check_with_torch = Deferred("qwenlora.trainer.data_check")


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option(help="Where the page goes. Default: beside the run folder.")
    ] = None,
) -> int:
    """Prepare the rows as training would, and show what they are like: on the screen, and as an HTML page.

    Example: qwenlora data check my.yaml
    """
    loaded = load_config(config, overrides or [])
    code: int = _module(loaded).check(loaded, html, screen())
    return code


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    first: Annotated[int, typer.Option(min=1, help="Number of the first row.")] = 1,
    ids: Annotated[bool, typer.Option("--ids", help="As a table of tokens.")] = False,
    evaluation: Annotated[bool, typer.Option("--eval", help="Rows of data.eval.")] = False,
) -> int:
    """Show rows as the model sees them, the trained tokens coloured.

    Example: qwenlora data preview my.yaml
    """
    loaded = load_config(config, overrides or [])
    _module(loaded).preview(loaded, "eval" if evaluation else "train", first, rows, ids=ids, console=screen())
    return 0


def _module(config: Config) -> ModuleType:
    # code that comes with a base may use torch
    return data_check_with_torch if config.model.trust_remote_code else data_check
