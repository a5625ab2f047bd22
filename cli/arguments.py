"""Arguments and options that several commands take."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from qwenlora.configs.keys import FIELDS
from qwenlora.configs.reference import choices_of

_RUN_FILES = ("config.yaml", "attempts.jsonl")


def _runs(incomplete: str) -> list[str]:
    """Return the run folders, and folders of them, that a word of a command line may become."""
    where = Path(incomplete.rpartition("/")[0] or "/") if "/" in incomplete else Path("runs")
    folders = [folder for folder in where.glob("[!.]*") if str(folder).startswith(incomplete)]
    patterns = [f"{depth}{name}" for depth in ("", "*/") for name in _RUN_FILES]
    return sorted(str(folder) for folder in folders if any(any(folder.glob(each)) for each in patterns))


def _overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the keys that a word may become, or after `key=` the values. bash cuts the word at the `=`."""
    given: list[str] = ctx.params.get("overrides") or []
    key, equals, value = incomplete.partition("=")
    before = f"{key}{equals}"
    if given and given[-1] == "=":
        key, before, value = given[-2], "", incomplete
    elif given and not incomplete and given[-1] in FIELDS:
        key, before = given[-1], ""
    if key in FIELDS and before != key:
        return [before + choice for choice in choices_of(FIELDS[key]) if choice.startswith(value)]
    return [f"{name}=" for name in FIELDS if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    """Return the keys that a word may become."""
    return [name for name in FIELDS if name.startswith(incomplete)]


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as lora.r=32.", autocompletion=_overrides),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run in run_dir aside; start anew.")]
AllowConfigChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="A key, such as train.learning_rate, that may differ from the run's so far.",
        autocompletion=_keys,
    ),
]


def run_argument(metavar: str, help: str) -> Any:
    """Return an argument for which shells complete the names of runs."""
    return typer.Argument(metavar=metavar, help=help, autocompletion=_runs)


Run = Annotated[Path, run_argument("RUN", "A run folder, such as runs/tiny.")]
RunOrJobName = Annotated[
    str, run_argument("RUN|JOB", "A run folder, such as runs/tiny, or a Slurm job's id.")
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
