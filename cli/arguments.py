"""Arguments and options that several commands take."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as lora.r=32.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run in run_dir aside; start anew.")]
AllowConfigChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="A key, such as train.learning_rate, that may differ from the run's so far."
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/tiny.")]
RunOrJobName = Annotated[
    str, typer.Argument(metavar="RUN|JOB", help="A run folder, such as runs/tiny, or a Slurm job's id.")
]


def with_options(options: type, **defaults: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command whose last parameter is **options an option for each key of a TypedDict, whose types are
    Annotated[type, help text]. defaults: by name; else None, or False for a bool."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        parameters = list(inspect.signature(command).parameters.values())[:-1]
        positional = [parameter for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
        hints = get_type_hints(options, include_extras=True)
        added = [_option(name, hint, defaults.get(name)) for name, hint in hints.items()]
        parameters = [*positional, *added, *parameters[len(positional) :]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _option(name: str, hint: Any, default: str | None) -> inspect.Parameter:
    kind, help_text = get_args(hint)
    keyword = inspect.Parameter.KEYWORD_ONLY
    if kind is bool:
        flag = Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", help=help_text)]
        return inspect.Parameter(name, keyword, default=False, annotation=flag)
    value: Any = int | None if {*get_args(kind)} == {int, NoneType} else str if default else str | None
    option = Annotated[value, typer.Option(help=help_text)]
    return inspect.Parameter(name, keyword, default=default, annotation=option)


def screen() -> Console:
    """Return the screen, which shows texts as they are."""
    return Console(markup=False, highlight=False)
