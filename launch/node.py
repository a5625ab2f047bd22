"""What an agent works with on its node, from the start to the end of a run."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.forkserver import Forkserver
from qwenlora.launch.hostfile import processes_per_node
from qwenlora.launch.meeting import Meeting
from qwenlora.run.folder import RunFolder
from qwenlora.run.snapshots import Snapshots


@dataclass
class Node:
    """One node of a run. allocation: the nodes of the attempt, fewer than the job's once some are lost; on a
    spare one the spare ones follow; resources: closed when the node's part is over; job: all nodes, as they
    were at the start; has_taken_over: this node leads in place of one that is gone; shell_is_gone: so is the
    batch shell, though that node may come back."""

    config: Config
    allocation: Allocation
    children: Children
    meeting: Meeting
    console: Console
    resources: ExitStack
    job: Allocation = field(init=False)
    has_taken_over: bool = False
    shell_is_gone: bool = False

    def __post_init__(self) -> None:
        self.job = self.allocation

    def meet(self, allocation: Allocation) -> None:
        """Begin to meet again, with these nodes, of which the first leads."""
        self.meeting.stay_until_exit()
        self.meeting = self.resources.enter_context(Meeting(allocation))

    @property
    def trains_on(self) -> int:
        """How many of the job's nodes train at a time."""
        return self.job.nodes - (self.config.launch.spare_nodes if self.job.requeues else 0)

    @property
    def others(self) -> set[int]:
        """The numbers, in the meeting, of the attempt's other nodes that are there."""
        meeting = self.meeting
        return {number for number in meeting.connected if self.trains(meeting.allocation.hosts[number])}

    def trains(self, host: str) -> bool:
        """Whether a node has ranks in this attempt: the others are spare, or lost."""
        return host in self.allocation.hosts[: self.trains_on]

    @property
    def keeps_snapshots(self) -> bool:
        """Whether snapshots are kept in memory: a restart could use them, and they are wanted."""
        return self.allocation.requeues and self.config.checkpoint.memory_steps != 0

    @cached_property
    def memory(self) -> Snapshots:
        """What keeps them."""
        memory = Snapshots()
        self.resources.callback(memory.close)
        return memory

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.config.run_dir)

    @cached_property
    def processes(self) -> int:
        """How many ranks this node runs."""
        return processes_per_node(self.config)

    @cached_property
    def forkserver(self) -> Forkserver:
        """What preparation and ranks are forked from. It begins to import when it is first asked for."""
        server = Forkserver(self.folder, self.processes)
        self.resources.callback(server.close)
        return server

    @property
    def forks_ranks(self) -> bool:
        """Whether the ranks are forked, too: DeepSpeed's launcher starts its own."""
        return self.config.launch.launcher == "torchrun"

    @property
    def stop_requested(self) -> bool:
        """Whether a stop signal came to this node."""
        return self.children.stop_requested

    def warn(self, message: str) -> None:
        """Print a warning, unless the message is empty."""
        if message:
            self.console.print(f"warning: {message}", style="yellow", soft_wrap=True)
