"""The `qwenlora` command. It imports a command's module only for that command: `--help` answers at once."""

import ast
import functools
import importlib
import keyword
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwenlora.run.lossy_output import escape_what_the_terminal_lacks

GROUPS = {
    "config": "Look at configs.",
    "data": "Look at the rows of a config, before training.",
    "slurm": "Jobs with plain sbatch.",
}
COMMANDS = {  # {command: the module of cli/ with the function of that name}
    "init": "init_command",
    "recipes": "init_command",
    "completion": "completion_command",
    "plan": "plan_command",
    "train": "train_commands",
    "preflight": "train_commands",
    "config show": "config_commands",
    "config keys": "config_commands",
    "config from": "config_commands",
    "config schema": "config_commands",
    "data check": "data_commands",
    "data preview": "data_commands",
    "submit": "submit_commands",
    "sweep": "submit_commands",
    "cancel": "run_commands",
    "resume": "submit_commands",
    "site": "submit_commands",
    "slurm scripts": "slurm_commands",
    "watch": "watch_command",
    "status": "run_commands",
    "logs": "run_commands",
    "report": "report_command",
    "runs": "run_commands",
    "nodes": "run_commands",
    "diff": "run_commands",
    "verify": "adapter_commands",
    "compare": "adapter_commands",
    "chat": "adapter_commands",
    "merge": "adapter_commands",
    "export": "adapter_commands",
    "convert-qwen1": "adapter_commands",
}
COMPLETES = "_QWENLORA_COMPLETE"  # set by the script of `qwenlora completion`
PANELS = {
    **dict.fromkeys(
        ("init", "recipes", "plan", "train", "preflight", "config", "data", "completion"), "Start"
    ),
    **dict.fromkeys(("submit", "sweep", "cancel", "resume", "site", "slurm"), "Jobs"),
    **dict.fromkeys(("watch", "status", "logs", "report", "runs", "diff", "nodes"), "Runs"),
    **dict.fromkeys(("verify", "compare", "chat", "merge", "export", "convert-qwen1"), "After training"),
}


class LazyGroup(TyperGroup):
    """A group whose help lists the table, and which loads a command only to run it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return (name, command, the rest of the arguments), as click asks for it."""
        name, command, rest = super().resolve_command(ctx, args)
        path = name if ctx.parent is None else f"{self.name} {name}"
        return name, load(path) if path in COMMANDS else command, rest


def load(name: str) -> Any:
    """Import a command's module and return the command. An unsuitable system is refused first."""
    command = name.split()[-1]
    refuse_other_systems()
    module = importlib.import_module(f"qwenlora.cli.{COMMANDS[name]}")
    function = getattr(module, _function_of(name))
    single = _group()
    single.command(command)(guarded(function))
    return typer.main.get_command(single)


def _function_of(name: str) -> str:
    word = name.split()[-1].replace("-", "_")
    return f"{word}_" if keyword.iskeyword(word) else word


def help_of(name: str) -> str:
    """Return the first paragraph of a command's help, its function's docstring, without importing the
    module."""
    nodes = _parsed(COMMANDS[name]).body
    (function,) = (n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == _function_of(name))
    return " ".join((ast.get_docstring(function) or "").partition("\n\n")[0].split())


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Return a command that leaves with its exit code; a ValueError is shown, without a trace, as code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except ValueError as error:
            _refuse(error)
        raise SystemExit(code)

    return run


def refuse_other_systems() -> None:
    """Leave with exit code 2 anywhere but on Linux."""
    if platform.system() != "Linux":
        _refuse(
            f"qwenlora runs on Linux, this is {platform.system()}: its checkpoints rely on Linux's file"
            " semantics (rename over an existing name, fsync of folders); on Windows, WSL2 works"
        )


def _refuse(problem: object) -> None:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def _group(**options: Any) -> typer.Typer:
    return typer.Typer(pretty_exceptions_enable=False, add_completion=False, **options)


def _listed() -> None:
    """Stand for a command in the help of its group."""


def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(importlib.import_module("qwenlora.cli.version").text())
        raise SystemExit(0)


def _whole() -> typer.Typer:
    """Return the command line, without the commands' modules."""
    whole = _group(
        cls=LazyGroup, help="LoRA fine-tuning of a Qwen, from one YAML file.", no_args_is_help=True
    )
    whole.callback(invoke_without_command=True)(_version)
    groups = {"": whole}
    for name, text in GROUPS.items():
        groups[name] = _group(cls=LazyGroup, help=text, no_args_is_help=True)
        whole.add_typer(groups[name], name=name, rich_help_panel=PANELS[name])
    for name in COMMANDS:
        group, _, command = name.rpartition(" ")
        groups[group].command(command, help=help_of(name), rich_help_panel=PANELS.get(name))(_listed)
    return whole


app = _whole()


def main() -> None:
    """Run the command line, or tell a shell what it may become."""
    escape_what_the_terminal_lacks()
    if COMPLETES in os.environ:
        importlib.import_module("typer.completion").completion_init()
    app()
