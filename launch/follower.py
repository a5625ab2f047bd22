"""The agent of a node that is not the first: it does as the first node's agent says."""

from dataclasses import dataclass

from qwenlora.launch import preflight, spare, succession
from qwenlora.launch.launcher import run_ranks
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import NotMet
from qwenlora.launch.messages import AgentLost, AgentMessage, FileInRunFolder, RunOver, StartRanks
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run.history import EXIT_CODES

JOIN_LATER_S = 3.0  # longer than the first node waits, whose message names all missing nodes


@dataclass
class Follower:
    """Follows whichever agent leads. start: the last of its orders to start ranks; succeeds: whether this
    node may lead, if that agent is lost in this attempt."""

    node: Node
    start: StartRanks | None = None
    succeeds: bool = False

    def follow(self) -> int:
        """Do as the agent that leads says; return 0 however the run ends (that agent reports it), 1 if nobody
        leads any more."""
        node = self.node
        if node.forks_ranks:
            _ = node.forkserver  # imports while the first node checks
        try:
            node.meeting.join(node.config.launch.join_timeout_s + JOIN_LATER_S, lambda: node.stop_requested)
        except NotMet:  # if the first machine is gone, so is the batch shell
            succession.end_job(node, EXIT_CODES["stopped"], leads=False)
            raise
        node.meeting.send(preflight.facts_of_this_node(node.config, node.processes))
        while (code := self._obey(node.meeting.receive(1.0))) is None:
            pass
        return code

    def _obey(self, message: AgentMessage | None) -> int | None:
        """Do what a message says; return the exit code if this agent is to leave."""
        match message:
            case FileInRunFolder(text=text):
                self.node.meeting.send(_look_for_file(self.node, text))
            case StartRanks():
                return self._start(message)
            case RunOver():
                return self._leave(EXIT_CODES["done"])
            case AgentLost():
                return self._go_on()
        return None

    def _start(self, start: StartRanks) -> int | None:
        """Run this node's ranks, or wait; return the exit code if this agent is to leave then."""
        node, self.start = self.node, start
        # where a file system's locks do not reach other nodes, nothing says who leads
        self.succeeds = node.allocation.requeues and node.folder.is_locked
        if node.job.host in start.spare:
            node.allocation = node.job.among(start.hosts + start.spare)
            spare.warm(node.folder)
            return None
        node.allocation = node.job.among(start.hosts)
        watch = Watch(node, start.handover.attempt)
        node.meeting.send(watch.ended(run_ranks(node, watch, start.handover, start.port)))
        if watch.run_over:
            return self._leave(EXIT_CODES["done"])
        if node.children.immortal:
            return self._leave(EXIT_CODES["failed"])
        return self._go_on() if watch.lost else None

    def _go_on(self) -> int | None:
        """Go on without the agent that led; return the exit code if the run ends here, None if another node
        leads now."""
        node, first = self.node, self.node.meeting.allocation.hosts[0]
        node.console.print(f"{node.job.host}: the agent of {first} is gone", soft_wrap=True)
        if self.start and self.succeeds and not node.stop_requested:
            succession.meet_anew(node, self.start.hosts + self.start.spare)
            if not node.meeting.allocation.first:
                return None
            code = Leader(node).take_over(self.start.handover, first)
            if code is not None:
                return code
        leads = node.meeting.allocation.first
        node.meeting.stay_until_exit()
        succession.end_job(node, EXIT_CODES["stopped"], leads=leads)
        return EXIT_CODES["failed"]

    def _leave(self, code: int) -> int:
        self.node.meeting.stay_until_exit()
        return code


def _look_for_file(node: Node, text: str) -> FileInRunFolder:
    """Check that the first node's file, with this text, is seen here; write a file of this node's, too."""
    path = node.folder.path
    if not preflight.sees_file(node.folder, 0, text):
        first = node.allocation.hosts[0]
        problem = (
            f"run_dir={path} is not the folder that {first} writes to; choose a run_dir on a file system"
        )
        return FileInRunFolder(problem=f"{problem} that all nodes share")
    try:
        return FileInRunFolder(text=preflight.write_file(node.folder, node.allocation.node))
    except OSError as error:
        return FileInRunFolder(problem=f"cannot write to run_dir={path}: {error.strerror}")
