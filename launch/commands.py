"""The commands that start ranks, as argument lists; nothing is started here."""

import base64
import json
import sys
from collections.abc import Sequence

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation, free_port
from qwenlora.run.folder import RunFolder
from qwenlora.run.hardware import visible_devices

RANK_MODULE = "qwenlora.trainer.main"
STANDALONE = ("--standalone",)  # torchrun on one node: a free port of this machine


def torchrun_argv(arguments: list[str], processes: int, rendezvous: Sequence[str] = STANDALONE) -> list[str]:
    """Return the command that starts a node's ranks by torchrun. arguments: a config file and overrides."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={processes}"]
    return [*torchrun, "-m", RANK_MODULE, *arguments]


def deepspeed_argv(arguments: list[str], processes: int, allocation: Allocation, port: int) -> list[str]:
    """Return the command that starts a node's ranks by DeepSpeed's launcher. port: of the first node.

    `deepspeed` runs the same on each host (deepspeed/launcher/runner.py, launch.py), but it needs pdsh, shows
    variables on command lines, has rules for CUDA_VISIBLE_DEVICES, and its processes outlive a killed agent.
    """
    node, host = allocation.node, allocation.hosts[0] if allocation.nodes > 1 else "127.0.0.1"
    devices = {f"node-{number}": list[int | str](range(processes)) for number in range(allocation.nodes)}
    devices[f"node-{node}"] = visible_devices(processes)
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    place = [f"--node_rank={node}", f"--master_addr={host}", f"--master_port={port}"]
    return [*launcher, *place, "--no_local_rank", "--module", RANK_MODULE, *arguments]


def argv_without_agents(
    config: Config, arguments: list[str], processes: int, hosts: Sequence[str]
) -> list[str]:
    """Return the command with which a user starts the ranks without agents."""
    if config.launch.launcher == "torchrun" and len(hosts) == 1:
        return torchrun_argv(arguments, processes)
    port = free_port(str(RunFolder(config.run_dir).path))
    if config.launch.launcher == "torchrun":
        meeting = [f"--nnodes={len(hosts)}", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0]}:{port}"]
        return torchrun_argv(arguments, processes, meeting)
    target = f"--hostfile={config.launch.hostfile}" if config.launch.hostfile else f"--num_gpus={processes}"
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", target, f"--master_port={port}"]
    return [*runner, "--no_local_rank", "--module", RANK_MODULE, *arguments]


def processes_in_words(count: int) -> str:
    """Return "1 process" or "N processes"."""
    return "1 process" if count == 1 else f"{count} processes"
