"""`qwenlora train` and `qwenlora preflight`."""

from typing import TYPE_CHECKING, Annotated

import typer

from qwenlora.adapter.deferred import Deferred
from qwenlora.cli.arguments import AllowConfigChange, ConfigFile, Fresh, Overrides, screen
from qwenlora.configs import Config, load_config
from qwenlora.configs.combinations import check_simulated
from qwenlora.launch import agent
from qwenlora.launch.dry_run import dry_run as describe
from qwenlora.launch.hostfile import processes_per_node
from qwenlora.launch.refusals import check_start
from qwenlora.trainer.ranks.screen import Rank

if TYPE_CHECKING:
    from qwenlora.trainer import simulate as simulation
else:
    simulation = Deferred("qwenlora.trainer.simulate")


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
    simulate_world: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="RANKS",
            help="Run the first and the last of so many ranks for three steps, without the others, and keep"
            " nothing: their memory, start-up and tokens.",
        ),
    ] = None,
) -> int:
    """Train, or go on training, the run of CONFIG on this machine.

    Example: qwenlora train my.yaml lora.r=32
    """
    options = {"nproc_per_node": nproc, "launcher": launcher, "hostfile": hostfile}
    from_options = [f"launch.{key}={value}" for key, value in options.items() if value is not None]
    all_overrides = [*(overrides or []), *from_options]
    loaded, allowed = load_config(config, all_overrides), allow_config_change or []
    if dry_run:
        arguments = [str(config), *all_overrides]
        print(describe(loaded, arguments, fresh=fresh, resume=resume, allowed=allowed), end="")
        return 0
    if simulate_world:
        return _simulate(loaded, simulate_world)
    return agent.run(loaded, fresh=fresh, resume=resume, allowed=allowed)


def _simulate(config: Config, world_size: int) -> int:
    """Simulate a run of so many ranks. Raises: ValueError when it cannot start, or not be simulated."""
    check_simulated(config, config.strategy.name)
    processes = min(processes_per_node(config), world_size)
    nodes, rest = divmod(world_size, processes)
    if rest:
        raise ValueError(
            f"--simulate-world {world_size}: expected a multiple of a node's {processes} processes"
        )
    check_start(config, nodes, processes)
    return simulation.simulate(config, Rank(world_size - 1, world_size), processes, screen())


def preflight(config: ConfigFile, overrides: Overrides = None) -> int:
    """Do the checks before a start, and nothing else: on this machine, or by srun on all nodes of an
    allocation.

    Example: srun qwenlora preflight my.yaml
    """
    return agent.run(load_config(config, overrides or []), only_check=True)
