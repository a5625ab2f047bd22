"""When the agent that leads is gone, in a job: the next node of the attempt leads, or the one after it. It is
the lock of the run folder that decides: who holds it, leads. The batch shell is gone, too, if its machine is;
then the agent that leads does at the end what the shell would have done."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from qwenlora.launch.allocation import candidate_ports
from qwenlora.launch.meeting import NotMet
from qwenlora.launch.node import Node
from qwenlora.run.history import EXIT_CODES
from qwenlora.slurm import query

ANSWER_S = 3.0  # for a machine to answer, with a refusal, too
NODE_LOSS_S = 600.0  # for Slurm to notice that a node is gone (SlurmdTimeout: 300 s by default)
SILENCE_S = 30.0  # of slurmctld, which may be restarting


def meet_anew(node: Node, hosts: tuple[str, ...]) -> None:
    """Meet at the first node that is left of these, in the order in which they would lead. After this,
    node.meeting tells whether this one leads: it does if those before it do not answer."""
    number = hosts.index(node.job.host)
    for before in range(1, number):
        node.meet(node.job.among(hosts[before:]))
        try:
            node.meeting.join(node.config.launch.join_timeout_s, lambda: node.stop_requested)
        except NotMet:
            continue
        return
    node.meet(node.job.among(hosts[number:]))


def take_screen(node: Node) -> None:
    """Look whether srun and the batch shell are gone. If so, have this process write to the job's output
    itself, as they did."""
    job = query.show(node.job.job_id) if node.job.job_id else None  # the accounting knows no output
    node.shell_is_gone = job is not None and _is_gone(node, job)
    if job is None or job.stdout is None or not node.shell_is_gone:
        return
    try:
        output = os.open(job.stdout, os.O_WRONLY | os.O_APPEND)
    except OSError:  # it is not on a file system that nodes share
        return
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)


def end_job(node: Node, code: int, *, leads: bool) -> None:
    """End the job, or requeue it, where its batch shell is gone: Slurm would keep it until its time limit.
    code: of the run. Slurm has no command that completes a job: one that is done is requeued, too, and ends
    at its start. Not before Slurm has noticed: the job would be given the lost node again. leads: this node
    led at the end; if none did, the first of those that are left does it. A signal to stop changes nothing:
    it is what most jobs end with."""
    job_id, first = node.job.job_id, node.job.hosts[0]
    heard = time.monotonic()
    end = heard + NODE_LOSS_S
    while job_id and node.job.requeues and time.monotonic() < min(end, heard + SILENCE_S):
        if job := query.show(job_id):  # the accounting does not know whether a job may be requeued
            heard = time.monotonic()
            if job.state != "RUNNING" or job.restarts != node.job.restarts:
                return  # Slurm has ended or requeued it
            if first in job.nodes:
                if not node.shell_is_gone and _answers(node):
                    return  # its batch shell does it
            elif (leads or job.nodes[:1] == (node.job.host,)) and _end_now(node, job, code):
                return
        time.sleep(1.0)


def _end_now(node: Node, job: query.JobInfo, code: int) -> bool:
    """Return whether Slurm does so."""
    if node.folder.is_locked:  # another node leads
        return False
    if job.requeue and code in (EXIT_CODES["done"], EXIT_CODES["stopped"]):
        then = "" if code else "; the run is done: it ends as soon as it starts"
        node.console.print(
            f"requeueing job {job.job_id}: {node.job.hosts[0]} is gone, and its batch shell{then}",
            soft_wrap=True,
        )
        return not query.requeue(job.job_id)
    query.cancel(job.job_id)
    return True


def _is_gone(node: Node, job: query.JobInfo) -> bool:
    """Whether the first machine has left the job, or is about to: Slurm takes minutes to notice."""
    return node.job.hosts[0] not in job.nodes or not _answers(node)


def _answers(node: Node) -> bool:
    """Whether the first machine is there: it answers, if only to refuse. A firewall may leave open only the
    agents' port, or all but that: both are tried, at once."""
    ports = (1, candidate_ports(node.meeting.run_id)[0])
    with ThreadPoolExecutor(len(ports)) as at_once:
        return any(at_once.map(lambda port: _answers_at(node.job.hosts[0], port), ports))


def _answers_at(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
