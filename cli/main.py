"""The `qwenlora` command. It imports a command's module only for that command: `--help` answers at once."""

import functools
import importlib
import platform
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup


class CommandEntry(NamedTuple):
    """A command: the module of cli/ with the function of that name, and the function's docstring."""

    module: str
    help: str


GROUPS = {"config": "Look at configs.", "data": "Look at the rows of a config, before training."}
COMMANDS = {
    "train": CommandEntry("train_commands", "Train, or go on training, the run of CONFIG on this machine."),
    "preflight": CommandEntry(
        "train_commands",
        "Do the checks before a start, and nothing else: on this machine, or by srun on all nodes of an"
        " allocation.",
    ),
    "submit": CommandEntry("submit_commands", "Submit the run of CONFIG as a job."),
    "sweep": CommandEntry(
        "submit_commands", "Submit a run for every combination of the values, as one job array."
    ),
    "status": CommandEntry(
        "run_commands",
        "Show a run's attempts, how far it is, its job and its checkpoints; of a sweep, a line a run.",
    ),
    "logs": CommandEntry(
        "run_commands", "Show the output of a run's job, or the log of one of its processes."
    ),
    "cancel": CommandEntry(
        "run_commands", "Stop a run for good: it saves, and does not come back by itself."
    ),
    "resume": CommandEntry(
        "submit_commands",
        "Have a run go on from its newest checkpoint: submitted again, as its last job was.",
    ),
    "site": CommandEntry(
        "submit_commands",
        "Print a site's options for sbatch: sbatch $(qwenlora site mycluster) slurm/train.sh my.yaml.",
    ),
    "verify": CommandEntry(
        "adapter_commands",
        "Check that an adapter is whole, fits its base, and holds something; say which base it needs.",
    ),
    "merge": CommandEntry(
        "adapter_commands",
        "Make one model of a base and an adapter, file by file, and compare its logits with theirs.",
    ),
    "chat": CommandEntry(
        "adapter_commands",
        "Talk with a model: in the terminal, with one prompt, or with the questions of a file.",
    ),
    "compare": CommandEntry(
        "adapter_commands",
        "Ask the base model and the tuned one the same: what was trained, in other words, in general.",
    ),
    "report": CommandEntry(
        "report_command",
        "Write a run up as one HTML page: curves over all attempts, settings, data, comparison; pictures"
        " beside it.",
    ),
    "runs": CommandEntry(
        "run_commands", "List runs: how far each is, its evaluation, its data, its key settings, its adapter."
    ),
    "diff": CommandEntry("run_commands", "Show in what two runs differ: config, code, data, results."),
    "export": CommandEntry(
        "adapter_commands",
        "Make a folder for a model hub: the adapter, its tokenizer, and a card filled in from the run.",
    ),
    "convert-qwen1": CommandEntry(
        "adapter_commands",
        "Turn a first-generation Qwen (Qwen-7B-Chat), or an adapter for it, into Qwen2's architecture.",
    ),
    "config show": CommandEntry(
        "config_commands", "Print the resolved config: defaults < CONFIG < overrides."
    ),
    "config schema": CommandEntry("config_commands", "Print the JSON Schema of a config, for editors."),
    "data check": CommandEntry(
        "data_commands",
        "Prepare the rows as training would, and show what they are like: on the screen, and as an HTML"
        " page.",
    ),
    "data preview": CommandEntry(
        "data_commands", "Show rows as the model sees them, the trained tokens coloured."
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
    entry, command = COMMANDS[name], name.split()[-1]
    refuse_other_systems()
    module = importlib.import_module(f"qwenlora.cli.{entry.module}")
    function = getattr(module, command.replace("-", "_"))
    single = _group()
    single.command(command)(guarded(function))
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
