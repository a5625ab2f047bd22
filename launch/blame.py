"""Which nodes the end of an attempt names as bad, and what a job does about it."""

from collections.abc import Iterator
from typing import NamedTuple

from qwenlora.launch.node import Node
from qwenlora.launch.verdict import first_error
from qwenlora.launch.watch import Watch
from qwenlora.run.bad_nodes import BadNodes, Kind, to_leave_out
from qwenlora.slurm import query


class Blamed(NamedTuple):
    """A node that was named. kind, what: as in NodeEntry."""

    kind: Kind
    host: str
    what: str


def warn_of_bad(node: Node) -> None:
    """Warn at the start of a job that has bad nodes: to wait for others might take longer than they hold."""
    bad = BadNodes.beside(node.folder).bad() if node.allocation.job_id else {}
    for host in node.allocation.hosts:
        if host in bad:
            node.warn(f"{host} was found bad: {bad[host][0].line}; if it fails, the job goes on without it")


def note_blamed(node: Node, watch: Watch) -> None:
    """Remember which nodes the end of an attempt in a job names, and say which are bad from now on."""
    if watch.cause or not node.allocation.job_id:
        return
    entries = BadNodes.beside(node.folder)
    before = entries.bad()
    try:
        for kind, host, what in {*_by_agents(node, watch), *_by_ranks(node, watch)}:
            entries.add(kind, host, what, node.folder, watch.attempt)
    except OSError as error:
        node.warn(f"{entries.folder} cannot be written ({error.strerror}): bad nodes are not remembered")
    found = {host: named for host, named in entries.bad().items() if host not in before}
    if bad := [host for host in node.allocation.hosts if host in found]:
        node.folder.note_attempt(bad=bad)
    for host in bad:
        node.warn(f"{host} is a bad node: {found[host][0].what}")


def _by_agents(node: Node, watch: Watch) -> Iterator[Blamed]:
    """Yield the nodes that the agents' watch names."""
    for host, fault in watch.gpu_faults.items():
        yield Blamed("driver", host, fault)
    # where all hang it may be the code: no node shows that the others are at fault; and a disk may be shared
    others_work = {*watch.behind} < {*node.allocation.hosts}
    for host, waits_for_disk in watch.behind.items():
        yield Blamed("stalled" if others_work and not waits_for_disk else "failed", host, watch.fault)
    for host in watch.absent:
        yield Blamed("failed", host, watch.fault)


def _by_ranks(node: Node, watch: Watch) -> Iterator[Blamed]:
    """Yield the nodes that the rank that failed first names, by checks before training or by its death."""
    error = None if watch.fault else first_error(node.folder, watch.attempt)
    if error is None:
        return
    kind: Kind = "preflight" if error.ours else "failed"
    for rank in error.bad_ranks:
        yield Blamed(kind, node.allocation.hosts[rank // node.processes], error.message)


def left_out_next(node: Node) -> tuple[str, ...]:
    """Return all nodes that the job is to leave out from its next start on, if it is to leave out more."""
    bad, job_id = BadNodes.beside(node.folder).bad(), node.allocation.job_id
    job = query.ask(job_id) if bad and job_id else None
    out = to_leave_out(bad, job, node.job.nodes) if job else []
    return (*job.excluded, *out) if job and out else ()
