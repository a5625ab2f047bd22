"""The agent of a node that is not the first: it does as the first node's agent says."""

import socket
import time

from qwenlora.launch import preflight
from qwenlora.launch.launcher import run_ranks
from qwenlora.launch.messages import AgentLost, FileInRunFolder, RanksEnded, RunOver, StartRanks
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run.history import EXIT_CODES
from qwenlora.slurm import query

ANSWER_S = 3.0  # for a machine to answer, with a refusal, too
NODE_LOSS_S = 600.0  # for Slurm to notice that a node is gone (SlurmdTimeout: 300 s by default)
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
                node.allocation = node.allocation.among(start.hosts)
                watch = Watch(node, start.handover.attempt)
                meeting.send(RanksEnded(code=run_ranks(node, watch, start.handover, start.port)))
                if watch.lost and not watch.run_over:
                    return _without_the_first(node)
                if watch.run_over or node.children.immortal:
                    meeting.stay_until_exit()
                    return EXIT_CODES["done" if watch.run_over else "failed"]
            case RunOver():
                meeting.stay_until_exit()
                return EXIT_CODES["done"]
            case AgentLost():
                return _without_the_first(node)


def _without_the_first(node: Node) -> int:
    """Leave: the first node's agent is gone. If its machine is gone, too, so is the batch shell that would
    requeue the job, and Slurm keeps a job that it was told not to kill (--no-kill)."""
    meeting, allocation = node.meeting, node.allocation
    first = meeting.allocation.hosts[0]
    node.console.print(f"{allocation.host}: the agent of {first} is gone", soft_wrap=True)
    meeting.stay_until_exit()
    if allocation.requeues and allocation.job_id and not node.stop_requested and not _answers(first):
        _requeue_without(node, first, allocation.job_id)
    return EXIT_CODES["failed"]


def _answers(host: str) -> bool:
    """Whether a machine is there: it answers, if only to refuse."""
    try:
        socket.create_connection((host, 1), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _requeue_without(node: Node, first: str, job_id: str) -> None:
    """Requeue the job once Slurm has taken its first node from it."""
    end = time.monotonic() + NODE_LOSS_S
    while time.monotonic() < end and not node.stop_requested:
        job = query.ask(job_id)
        if job is None or job.state != "RUNNING" or job.restarts != node.allocation.restarts:
            return  # Slurm has ended or requeued it, or is not there to be asked
        if first not in job.nodes and job.nodes[:1] == (node.allocation.host,) and job.requeue:
            node.console.print(f"requeueing job {job_id}: {first} is gone", soft_wrap=True)
            query.requeue(job_id)
            return
        time.sleep(1.0)


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
