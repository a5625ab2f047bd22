"""Nodes that jobs do better without: an entry for each time that one was named, in .bad_nodes/ beside the run
folders. A file an entry, written whole: jobs that write at the same time need no lock."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import ago, short
from qwenlora.run.records import Moment, Record, now
from qwenlora.slurm.query import ClusterNode, JobInfo, cluster_nodes

KEEP = timedelta(days=3)  # over a weekend; by then a node is mended, or its administrators have drained it
ENOUGH = 2  # attempts that must name a node, where one may be chance

Kind = Literal["preflight", "stalled", "driver", "failed", "slow", "by hand"]
_AT_ONCE: tuple[Kind, ...] = ("preflight", "stalled", "driver", "by hand")


class NodeEntry(Record):
    """Why a node was named. kind: what named it; what: in words; run, attempt: which one did."""

    host: str
    time: Moment
    kind: Kind
    what: str
    run: str = ""
    attempt: int = 0

    @property
    def line(self) -> str:
        """The entry in words."""
        of_run = f", attempt {self.attempt} of {Path(self.run).name}" if self.run else ""
        return f"{self.what} ({ago((now() - self.time).total_seconds())} ago{of_run})"


class BadNodes:
    """The entries beside some run folders. runs: the folder in which they are."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / ".bad_nodes"

    @classmethod
    def beside(cls, run: RunFolder) -> "BadNodes":
        """Return those beside a run."""
        return cls(run.path.parent)

    def add(self, kind: Kind, host: str, what: str, run: RunFolder | None = None, attempt: int = 0) -> None:
        """Add an entry; forget those that are too old. Raises: OSError."""
        time = now()
        entry = NodeEntry(
            host=host,
            time=time,
            kind=kind,
            what=short(what, 200),
            run=str(run.path) if run else "",
            attempt=attempt,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{host}-{time:%Y%m%d-%H%M%S.%f}-{os.getpid()}.json", entry.text())
        for file, old in self._read():
            if not _counts(old):
                file.unlink(missing_ok=True)

    def clear(self, hosts: Sequence[str]) -> None:
        """Remove the entries of these nodes. Raises: OSError."""
        for file, entry in self._read():
            if entry.host in hosts:
                file.unlink(missing_ok=True)

    def entries(self) -> dict[str, list[NodeEntry]]:
        """Return {host: its entries that count, newest first}, the node that was named last first."""
        kept = sorted((entry for _, entry in self._read() if _counts(entry)), key=lambda entry: entry.time)
        by_host: dict[str, list[NodeEntry]] = {}
        for entry in reversed(kept):
            by_host.setdefault(entry.host, []).append(entry)
        return by_host

    def bad(self) -> dict[str, list[NodeEntry]]:
        """Return those nodes that jobs leave out: named by what is no chance, or by two attempts."""
        return {host: entries for host, entries in self.entries().items() if _is_bad(entries)}

    def _read(self) -> Iterable[tuple[Path, NodeEntry]]:
        for file in sorted(self.folder.glob("*.json")):
            try:
                yield file, NodeEntry.read(file)
            except (OSError, ValueError):  # cleared meanwhile, or damaged: no reason to leave a node out
                continue


def _counts(entry: NodeEntry) -> bool:
    return entry.kind == "by hand" or now() - entry.time < KEEP


def _is_bad(entries: Sequence[NodeEntry]) -> bool:
    attempts = {(entry.run, entry.attempt) for entry in entries}
    return len(attempts) >= ENOUGH or any(entry.kind in _AT_ONCE for entry in entries)


def to_leave_out(bad: Iterable[str], job: JobInfo, needed: int) -> list[str]:
    """Return the bad nodes that a job can do without, besides those that it leaves out already. needed: how
    many nodes it takes."""
    if job.required or job.reservation:  # it has to take what it named
        return []
    left = [node for node in cluster_nodes(job.partition) if node.name not in job.excluded]
    return spared(bad, left, needed)


def spared(bad: Iterable[str], cluster: Sequence[ClusterNode], needed: int) -> list[str]:
    """Return those bad nodes without which the cluster still has enough: of each kind of node that works, as
    many stay as a job takes, whichever kind it wants."""
    kinds = {node.name: node.kind for node in cluster}
    left, out = Counter(node.kind for node in cluster if node.works), []
    working = {node.name for node in cluster if node.works}
    for host in filter(kinds.__contains__, bad):
        takes = int(host in working)
        if left[kinds[host]] - takes >= needed:
            left[kinds[host]] -= takes
            out.append(host)
    return out
