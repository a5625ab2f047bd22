"""What all commands share: how they end, and the arguments that most of them take."""

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as lora.r=32.")
]


def guarded(command: Callable[[], int]) -> None:
    """Run a command and leave with its exit code; a ValueError is the user's to mend: its lines, and code
    2."""
    try:
        if platform.system() != "Linux":
            raise ValueError(
                f"qwenlora runs on Linux, this is {platform.system()}: its checkpoints rely on Linux's file"
                " semantics (rename over an existing name, fsync of folders); on Windows, WSL2 works"
            )
        code = command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
