"""The `qwenlora` command. Each command imports what it needs when it runs: --help answers at once, without
torch."""

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli import adapter_commands, job_commands
from qwenlora.cli.guarded import ConfigFile, Overrides, guarded

app = typer.Typer(
    help="LoRA fine-tuning of a Qwen, from one YAML file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")
data_app = typer.Typer(help="Look at the rows of a config, before training.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one a GPU, or 1.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="torchrun or deepspeed: what starts the processes. Default: torchrun.")
    ] = None,
    hostfile: Annotated[
        str | None,
        typer.Option(help="Several machines without Slurm: a file with a line `HOST slots=N` for each."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto (the newest whole checkpoint), none (as --fresh), checkpoint-200, or a path."
        ),
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run in run_dir aside; start anew.")
    ] = False,
    allow_config_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key, such as train.learning_rate, that may differ from the run's so far."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved config, what follows from it, and the command."),
    ] = False,
) -> None:
    """Train, or go on training, the run of CONFIG on this machine."""

    def command() -> int:
        from qwenlora.configs import load_config
        from qwenlora.launch import agent
        from qwenlora.launch.dry_run import dry_run as describe

        options = {"nproc_per_node": nproc, "launcher": launcher, "hostfile": hostfile}
        said = [f"launch.{key}={value}" for key, value in options.items() if value is not None]
        chosen = [*(overrides or []), *said]
        loaded, allowed = load_config(config, chosen), allow_config_change or []
        if dry_run:
            said = [str(config), *chosen]
            print(describe(loaded, said, fresh=fresh, resume=resume, allowed=allowed), end="")
            return 0
        return agent.run(loaded, fresh=fresh, resume=resume, allowed=allowed)

    guarded(command)


@app.command()
def preflight(config: ConfigFile, overrides: Overrides = None) -> None:
    """Do the checks before a start, and nothing else: on this machine, or by srun on all nodes of an
    allocation."""

    def command() -> int:
        from qwenlora.configs import load_config
        from qwenlora.launch import agent

        return agent.run(load_config(config, overrides or []), only_check=True)

    guarded(command)


@data_app.command("check")
def data_check(
    config: ConfigFile,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option(help="Where the page goes. Default: beside the run folder.")
    ] = None,
) -> None:
    """Prepare the rows as training would, and show what they are like: on the screen, and as an HTML page."""

    def command() -> int:
        from rich.console import Console

        from qwenlora.adapter import quiet
        from qwenlora.configs import load_config

        loaded = load_config(config, overrides or [])
        with quiet():
            from qwenlora.trainer import data_check as rows
        return rows.check(loaded, html, Console(markup=False, highlight=False))

    guarded(command)


@data_app.command("preview")
def data_preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    first: Annotated[int, typer.Option(min=1, help="Number of the first row.")] = 1,
    ids: Annotated[bool, typer.Option("--ids", help="As a table of tokens.")] = False,
    evaluation: Annotated[bool, typer.Option("--eval", help="Rows of data.eval.")] = False,
) -> None:
    """Show rows as the model sees them, the trained tokens coloured."""

    def command() -> int:
        from rich.console import Console

        from qwenlora.adapter import quiet
        from qwenlora.configs import load_config

        loaded = load_config(config, overrides or [])
        with quiet():
            from qwenlora.trainer import data_check
        console = Console(markup=False, highlight=False)
        data_check.preview(loaded, "eval" if evaluation else "train", first, rows, ids=ids, console=console)
        return 0

    guarded(command)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved config: defaults < CONFIG < overrides."""

    def command() -> int:
        from qwenlora.configs import load_config
        from qwenlora.configs.load import to_yaml

        print(to_yaml(load_config(config, overrides or [])), end="")
        return 0

    guarded(command)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a config, for editors."""

    def command() -> int:
        import json

        from qwenlora.configs import Config

        print(json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False))
        return 0

    guarded(command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(metadata.version("qwenlora"))
        raise SystemExit(0)


job_commands.register(app)
adapter_commands.register(app)


def main() -> None:
    """Run the command line."""
    app()
