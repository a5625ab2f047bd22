"""The `qwenlora` command: a table of commands, and how each is loaded, run and ended.

A command's module is imported when the command runs, or its own --help is asked for: `qwenlora --help`
answers at once, without torch.
"""

import functools
import importlib
import platform
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperGroup

from qwenlora.adapter import quiet


class Entry(NamedTuple):
    """A command: its function in a module of cli/, and the function's docstring. slow: it imports torch."""

    module: str
    function: str
    help: str
    slow: bool = False


GROUPS = {"config": "Look at configs.", "data": "Look at the rows of a config, before training."}
COMMANDS = {
    "train": Entry("train_commands", "train", "Train, or go on training, the run of CONFIG on this machine."),
    "preflight": Entry(
        "train_commands",
        "preflight",
        "Do the checks before a start, and nothing else: on this machine, or by srun on all nodes of an"
        " allocation.",
    ),
    "submit": Entry("submit_commands", "submit", "Submit the run of CONFIG as a job."),
    "sweep": Entry(
        "submit_commands", "sweep", "Submit a run for every combination of the values, as one job array."
    ),
    "status": Entry(
        "run_commands",
        "status",
        "Show a run's attempts, how far it is, its job and its checkpoints; of a sweep, a line a run.",
    ),
    "logs": Entry(
        "run_commands", "logs", "Show the output of a run's job, or the log of one of its processes."
    ),
    "cancel": Entry(
        "run_commands", "cancel", "Stop a run for good: it saves, and does not come back by itself."
    ),
    "resume": Entry(
        "submit_commands",
        "resume",
        "Have a run go on from its newest checkpoint: submitted again, as its last job was.",
    ),
    "site": Entry(
        "submit_commands",
        "site",
        "Print a site's options for sbatch: sbatch $(qwenlora site mycluster) slurm/train.sh my.yaml.",
    ),
    "verify": Entry(
        "adapter_commands",
        "verify",
        "Check that an adapter is whole, fits its base, and holds something; say which base it needs.",
        slow=True,
    ),
    "merge": Entry(
        "adapter_commands",
        "merge",
        "Make one model of a base and an adapter, file by file, and compare its logits with theirs.",
        slow=True,
    ),
    "chat": Entry(
        "adapter_commands",
        "chat",
        "Talk with a model: in the terminal, with one prompt, or with the questions of a file.",
        slow=True,
    ),
    "compare": Entry(
        "adapter_commands",
        "compare",
        "Ask the base model and the tuned one the same: what was trained, in other words, in general.",
        slow=True,
    ),
    "report": Entry(
        "report_command",
        "report",
        "Write a run up as one HTML page: curves over all attempts, settings, data, comparison; pictures"
        " beside it.",
    ),
    "runs": Entry(
        "run_commands",
        "runs",
        "List runs: how far each is, its evaluation, its data, its key settings, its adapter.",
    ),
    "diff": Entry("run_commands", "diff", "Show in what two runs differ: config, code, data, results."),
    "export": Entry(
        "adapter_commands",
        "export",
        "Make a folder for a model hub: the adapter, its tokenizer, and a card filled in from the run.",
        slow=True,
    ),
    "convert-qwen1": Entry(
        "adapter_commands",
        "convert_qwen1",
        "Turn a first-generation Qwen (Qwen-7B-Chat), or an adapter for it, into Qwen2's architecture.",
        slow=True,
    ),
    "config show": Entry(
        "config_commands", "show", "Print the resolved config: defaults < CONFIG < overrides."
    ),
    "config schema": Entry("config_commands", "schema", "Print the JSON Schema of a config, for editors."),
    "data check": Entry(
        "data_commands",
        "check",
        "Prepare the rows as training would, and show what they are like: on the screen, and as an HTML"
        " page.",
        slow=True,
    ),
    "data preview": Entry(
        "data_commands",
        "preview",
        "Show rows as the model sees them, the trained tokens coloured.",
        slow=True,
    ),
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
    entry = COMMANDS[name]
    refuse_other_systems()
    module = f"qwenlora.cli.{entry.module}"
    if entry.slow:
        with quiet(), Console(stderr=True).status("starting", spinner_style="dim"):
            function = getattr(importlib.import_module(module), entry.function)
    else:
        function = getattr(importlib.import_module(module), entry.function)
    single = _group()
    single.command(name.split()[-1])(guarded(function))
    return typer.main.get_command(single)


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
        whole.add_typer(groups[name], name=name)
    for name, entry in COMMANDS.items():
        group, _, command = name.rpartition(" ")
        groups[group].command(command, help=entry.help)(_listed)
    return whole


app = _whole()


def main() -> None:
    """Run the command line."""
    app()
