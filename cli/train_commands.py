"""`qwenlora train` and `qwenlora preflight`."""

from typing import Annotated

import typer

from qwenlora.cli.arguments import AllowConfigChange, ConfigFile, Fresh, Overrides
from qwenlora.configs import load_config
from qwenlora.launch import agent
from qwenlora.launch.dry_run import dry_run as describe


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
    fresh: Fresh = False,
    allow_config_change: AllowConfigChange = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved config, what follows from it, and the command."),
    ] = False,
) -> int:
    """Train, or go on training, the run of CONFIG on this machine."""
    options = {"nproc_per_node": nproc, "launcher": launcher, "hostfile": hostfile}
    from_options = [f"launch.{key}={value}" for key, value in options.items() if value is not None]
    all_overrides = [*(overrides or []), *from_options]
    loaded, allowed = load_config(config, all_overrides), allow_config_change or []
    if dry_run:
        arguments = [str(config), *all_overrides]
        print(describe(loaded, arguments, fresh=fresh, resume=resume, allowed=allowed), end="")
        return 0
    return agent.run(loaded, fresh=fresh, resume=resume, allowed=allowed)


def preflight(config: ConfigFile, overrides: Overrides = None) -> int:
    """Do the checks before a start, and nothing else: on this machine, or by srun on all nodes of an
    allocation."""
    return agent.run(load_config(config, overrides or []), only_check=True)
