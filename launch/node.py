"""What an agent works with on its node, from the start to the end of a run."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.forkserver import Forkserver
from qwenlora.launch.hostfile import processes_per_node
from qwenlora.launch.meeting import Meeting
from qwenlora.run.folder import RunFolder


@dataclass
class Node:
    """One node of a run. allocation: the nodes of the attempt, fewer than the job's once some are lost;
    resources: closed when the node's part is over."""

    config: Config
    allocation: Allocation
    children: Children
    meeting: Meeting
    console: Console
    resources: ExitStack

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
