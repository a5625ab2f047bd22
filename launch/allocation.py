"""The nodes of a run, which of them this is, and their ports. Without srun or hostfile there is one node."""

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenlora.slurm import query

INTERACTIVE_STEP = "4294967290"  # the step of salloc's shell, where Slurm is set up so (slurm.h)


@dataclass(frozen=True)
class Allocation:
    """The nodes of a run, as one of them sees them. node: its index in hosts; restarts: how often Slurm has
    requeued the job; requeues: the batch shell requeues it when this agent leaves with 75; name, secret: with
    a hostfile, by these the agents know each other; only secret is kept from everybody else."""

    node: int
    hosts: tuple[str, ...]
    job_id: str | None
    restarts: int
    requeues: bool
    name: str = ""
    secret: str = ""

    @property
    def nodes(self) -> int:
        """How many nodes the run has."""
        return len(self.hosts)

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]

    @property
    def first(self) -> bool:
        """Whether this node leads the others."""
        return self.node == 0

    def among(self, hosts: Sequence[str]) -> "Allocation":
        """Return the allocation with only these nodes, in their order. This node must be one of them."""
        return replace(self, hosts=tuple(hosts), node=tuple(hosts).index(self.host))

    @property
    def by_ssh(self) -> bool:
        """Whether the first agent starts the others by ssh: the machines are those of a hostfile."""
        return bool(self.name)


def current_allocation() -> Allocation:
    """Return the allocation, from Slurm's variables. Raises: ValueError if a node has several tasks."""
    job_id = _job_id()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    requeues = job_id is not None and os.environ.get("QWENLORA_REQUEUES") == "1"
    if job_id is None or "SLURM_STEP_ID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        _refuse_one_of_several(int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
        return Allocation(0, (socket.gethostname(),), job_id, restarts, requeues)
    hosts = query.hosts(os.environ["SLURM_STEP_NODELIST"])
    if _typed():
        _refuse_one_of_several(len(hosts))
    if os.environ["SLURM_STEP_ID"] == INTERACTIVE_STEP:
        _refuse_one_of_several(int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", len(hosts)))) != len(hosts):
        raise ValueError(
            f"srun started {tasks} tasks on {len(hosts)} node{'s' * (len(hosts) > 1)}, qwenlora needs one a"
            " node, which starts the processes itself: srun --ntasks-per-node=1, as in slurm/train.sh"
        )
    return Allocation(int(os.environ.get("SLURM_NODEID", "0")), hosts, job_id, restarts, requeues)


def _refuse_one_of_several(nodes: int) -> None:
    """Refuse a start by the shell of one node, where the job, or this step of it, has several."""
    if nodes > 1:
        raise ValueError(
            f"this shell is on one of {nodes} nodes, and starts nothing on the others; on all of them: `srun"
            f" --nodes={nodes} --ntasks-per-node=1 qwenlora train ...` in a shell of salloc, or `sbatch"
            f" --nodes={nodes} slurm/train.sh ...`; on one: `srun --nodes=1 --ntasks=1 qwenlora train ...`"
        )


def _typed() -> bool:
    """Whether somebody typed this command: a shell with a terminal gives it a process group of its own. What
    srun starts itself, `--pty` or not, is in the group of its session."""
    return any(os.isatty(number) for number in range(3)) and os.getpgrp() != os.getsid(0)


def _job_id() -> str | None:
    """Return the job's id; in an array ARRAY_TASK: the array's own number is also the last task's job id."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


# below the ports that Linux gives to outgoing connections (ip_local_port_range, from 32768)
FIRST_PORT, PORTS = 10_000, 22_000
_CANDIDATES = 8


def candidate_ports(token: str) -> list[int]:
    """Return the ports to try, in order; they follow from the token."""
    start = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big")
    return [FIRST_PORT + (start + 2_741 * number) % PORTS for number in range(_CANDIDATES)]


def free_port(token: str) -> int:
    """Return a free port of this machine, derived from the token. Raises: ValueError when none is free."""
    ports = candidate_ports(f"{token} ranks")
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ValueError(f"none of the ports {ports} is free on {socket.gethostname()}")
