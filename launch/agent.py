"""The agent of a node, from a config to an exit code: 0 done, 75 run again, 2 refused, 1 failed. No torch.

`qwenlora train` runs it, on this machine or as srun's one task on each node of a job; with a hostfile it also
starts the agents of the other machines (ssh.py). The first node's agent leads and reports (leader.py), the
others follow (follower.py). Each runs its node's ranks (launcher.py).
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.launch import hostfile
from qwenlora.launch.allocation import Allocation, current_allocation
from qwenlora.launch.children import Children, guarded
from qwenlora.launch.follower import Follower
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.node import Node
from qwenlora.launch.refusals import (
    check_allowed_keys,
    check_launcher_in_slurm,
    check_start,
    nodes_that_train,
)
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.lossy_output import lossy
from qwenlora.run.signals import under_nohup


def run(
    config: Config,
    *,
    fresh: bool = False,
    resume: str = "auto",
    allowed: Sequence[str] = (),
    only_check: bool = False,
) -> int:
    """Run this node's part of a config; return the exit code. Raises: ValueError when it cannot start.

    fresh: set an earlier run aside; resume: auto (the newest whole checkpoint), none (as fresh), or the name
    or path of a checkpoint; allowed: config keys or sections that may differ from the run's earlier attempts;
    only_check: end after the checks before the start.
    """
    config, allocation, variables = _allocate(config)
    if only_check:
        run_dir = RunFolder(config.run_dir).path
        config = config.model_copy(update={"run_dir": str(run_dir.with_name(f".preflight-{run_dir.name}"))})
    spares = allocation.requeues  # elsewhere none would ever be used
    check_start(config, nodes_that_train(config, allocation.nodes) if spares else allocation.nodes)
    check_allowed_keys(allowed)
    if fresh and resume not in ("auto", "none"):
        raise ValueError(f"--fresh starts anew, --resume {resume} goes on; leave one of them out")
    if not allocation.first:
        return run_follower(config, allocation)
    resume = "none" if fresh else resume
    if resume != "auto" and allocation.restarts:
        _console().print(
            "requeued by Slurm: going on from the newest checkpoint, without --fresh and --resume"
        )
        resume = "auto"
    handover = Handover(0, resume, tuple(allowed), nohup=under_nohup())
    return _run_part(
        config, allocation, lambda node: Leader(node, variables).lead(handover, only_check=only_check)
    )


def run_follower(config: Config, allocation: Allocation) -> int:
    """Run the part of a node that is not the first; return its exit code."""
    return _run_part(config, allocation, lambda node: Follower(node).follow())


def _allocate(config: Config) -> tuple[Config, Allocation, dict[str, str]]:
    """Return the config for all nodes, this node's allocation, and variables for agents started by ssh."""
    allocation = current_allocation()
    if allocation.job_id is not None:
        check_launcher_in_slurm(config)
    hosts = hostfile.of(config)
    if hosts is None:
        return config, allocation, {}
    allocation, config = hostfile.allocation_of(hosts), hostfile.with_slots(config, hosts)
    more = hostfile.add_deepspeed_env(os.environ) if config.launch.launcher == "deepspeed" else set()
    return config, allocation, hostfile.forwarded(os.environ, more)


def _run_part(config: Config, allocation: Allocation, part: Callable[[Node], int]) -> int:
    console = _console()
    with redirect_stdout(lossy(sys.stdout)), ExitStack() as resources:
        if allocation.requeues:  # elsewhere somebody sees that it hangs
            resources.enter_context(guarded(config.launch.stall_timeout_s))
        children = resources.enter_context(Children())
        try:
            meeting = resources.enter_context(Meeting(allocation))
            return part(Node(config, allocation, children, meeting, console, resources))
        except NotMet as missing:
            if not children.stop_requested:
                prefix = "failed: " * allocation.first  # only the first node reports how the run ended
                console.print(f"{prefix}{missing}", style="red", soft_wrap=True)
            return EXIT_CODES["failed"]


def _console() -> Console:
    return Console(markup=False, highlight=False)
