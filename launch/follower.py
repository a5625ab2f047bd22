"""The agent of a node that is not the first: it does as the first node's agent says."""

from qwenlora.launch import preflight, succession
from qwenlora.launch.launcher import run_ranks
from qwenlora.launch.leader import Leader
from qwenlora.launch.messages import AgentLost, FileInRunFolder, RanksEnded, RunOver, StartRanks
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run.history import EXIT_CODES

JOIN_LATER_S = 3.0  # longer than the first node waits, whose message names all missing nodes


def follow(node: Node) -> int:
    """Do as the first node says, or as the one that leads when that is gone; return 0 however the run ends
    (who leads reports that), 1 if nobody leads any more."""
    if node.forks_ranks:
        _ = node.forkserver  # imports while the first node checks
    node.meeting.join(node.config.launch.join_timeout_s + JOIN_LATER_S, lambda: node.stop_requested)
    node.meeting.send(preflight.facts_of_this_node(node.config, node.processes))
    start: StartRanks | None = None  # the last
    succeeds = False  # whether this node may lead
    while True:
        meeting, lost = node.meeting, False
        match meeting.receive(1.0):
            case FileInRunFolder(text=text):
                meeting.send(_look_for_file(node, text))
            case StartRanks() as start:
                # where a file system's locks do not reach other nodes, nothing says who leads
                succeeds = node.allocation.requeues and node.folder.is_locked
                watch = _run_ranks(node, start)
                lost = bool(watch.lost) and not watch.run_over
                if watch.run_over or node.children.immortal:
                    meeting.stay_until_exit()
                    return EXIT_CODES["done" if watch.run_over else "failed"]
            case RunOver():
                meeting.stay_until_exit()
                return EXIT_CODES["done"]
            case AgentLost():
                lost = True
        if lost:
            first = meeting.allocation.hosts[0]
            node.console.print(f"{node.job.host}: the agent of {first} is gone", soft_wrap=True)
            code = _go_on_without(node, first, start if succeeds else None)
            if code is not None:
                return code


def _run_ranks(node: Node, start: StartRanks) -> Watch:
    node.allocation = node.allocation.among(start.hosts)
    watch = Watch(node, start.handover.attempt)
    node.meeting.send(RanksEnded(code=run_ranks(node, watch, start.handover, start.port)))
    return watch


def _go_on_without(node: Node, first: str, start: StartRanks | None) -> int | None:
    """Find who leads now; return the exit code if the run ends here, None if another node leads. start: of
    the attempt that has lost its first node; without one this node does not go on."""
    if start and not node.stop_requested and not node.children.immortal:
        succession.meet_anew(node)
        if not node.meeting.allocation.first:
            return None
        code = Leader(node).take_over(start.handover, first)
        if code is not None:
            return code
    node.meeting.stay_until_exit()
    succession.end_job(node, EXIT_CODES["stopped"], leads=False)
    return EXIT_CODES["failed"]


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
