"""The agent of a node that is not the first: it does as the first node's agent says."""

from qwenlora.launch import preflight
from qwenlora.launch.launcher import run_ranks
from qwenlora.launch.messages import AgentLost, FileInRunFolder, RanksEnded, RunOver, StartRanks
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run.history import EXIT_CODES

JOIN_LATER_S = 3.0  # longer than the first node waits, whose message names all missing nodes


def follow(node: Node) -> int:
    """Do as the first node says; return 0 however the run ends (it reports that), 1 if its agent is gone."""
    meeting = node.meeting
    if node.forks_ranks:
        _ = node.forkserver  # imports while the first node checks
    meeting.join(node.config.launch.join_timeout_s + JOIN_LATER_S, lambda: node.stop_requested)
    meeting.send(preflight.facts_of_this_node(node.config, node.processes))
    while True:
        match meeting.receive(1.0):
            case FileInRunFolder(text=text):
                meeting.send(_look_for_file(node, text))
            case StartRanks() as start:
                watch = Watch(node, start.handover.attempt)
                meeting.send(RanksEnded(code=run_ranks(node, watch, start.handover, start.port)))
                if watch.run_over or watch.agent_lost:
                    meeting.stay_until_exit()
                    return EXIT_CODES["failed" if watch.agent_lost else "done"]
            case RunOver():
                meeting.stay_until_exit()
                return EXIT_CODES["done"]
            case AgentLost():
                hosts = node.allocation.hosts
                node.console.print(f"{node.allocation.host}: the agent of {hosts[0]} is gone", soft_wrap=True)
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
