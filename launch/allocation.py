"""Which of a job's nodes this is: one agent runs on each. Without Slurm, or outside of srun, there is one
node."""

import hashlib
import os
import socket
from dataclasses import dataclass

from qwenlora.slurm import query as answers


@dataclass(frozen=True)
class Allocation:
    """node: number of this one among hosts, from 0; job_id: as Slurm names it; restarts: how often it was
    requeued.

    requeues: whoever started this agent starts it again when it leaves with 75. Without a job, agents that
    the first one started know each other by name, which is in their command lines, and secret, which is not.
    """

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
        """Return this node's name."""
        return self.hosts[self.node]

    @property
    def first(self) -> bool:
        """Whether this is the node that decides and speaks for all."""
        return self.node == 0


def allocation() -> Allocation:
    """Return what Slurm's environment says of this process. Raises: ValueError when it is not one task a
    node."""
    job_id = _job_id()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    requeues = job_id is not None and os.environ.get("QWENLORA_REQUEUES") == "1"
    if job_id is None or "SLURM_STEP_ID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        return Allocation(0, (socket.gethostname(),), job_id, restarts, requeues)
    hosts = answers.hosts(os.environ["SLURM_STEP_NODELIST"])
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", len(hosts)))) != len(hosts):
        raise ValueError(
            f"srun started {tasks} tasks on {len(hosts)} node{'s' * (len(hosts) > 1)}, qwenlora needs one a"
            " node, which starts the processes itself: srun --ntasks-per-node=1, as slurm/train.sh has it"
        )
    return Allocation(int(os.environ.get("SLURM_NODEID", "0")), hosts, job_id, restarts, requeues)


def _job_id() -> str | None:
    """Return the job's name; a task of an array has one of its own, its number may also be the whole
    array's."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


# below Linux's own choice for outgoing connections (ip_local_port_range, from 32768)
FIRST_PORT, PORTS = 10_000, 22_000
_CANDIDATES = 8


def candidate_ports(token: str) -> list[int]:
    """Return ports that follow from a text, in the order in which they are tried."""
    start = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big")
    return [FIRST_PORT + (start + 2_741 * number) % PORTS for number in range(_CANDIDATES)]


def free_port(token: str) -> int:
    """Return a port of this machine that is free now, derived from a text. Raises: ValueError when none
    is."""
    for port in candidate_ports(f"{token} ranks"):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ValueError(
        f"none of the ports {candidate_ports(f'{token} ranks')} is free on {socket.gethostname()}"
    )
