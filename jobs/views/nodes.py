"""`qwenlora nodes`: the nodes that were found bad, beside the runs of a folder; adds and removes them."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qwenlora.run.bad_nodes import KEEP, BadNodes, spared
from qwenlora.run.format import ago
from qwenlora.run.records import now
from qwenlora.slurm.query import cluster_nodes, hosts


def show_nodes(entries: BadNodes, console: Console) -> None:
    """Print each entry, the newest first, and whether it makes its node bad."""
    by_host, bad = entries.entries(), entries.bad()
    if not by_host:
        console.print(
            f"no node was found bad in the last {KEEP.days} days, beside the runs in {entries.folder.parent}",
            soft_wrap=True,
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("node", "state", "named", "by", "why"):
        table.add_column(name, overflow="fold")
    for host, named in by_host.items():
        for entry in named:
            state = "bad" if host in bad else "not bad"
            when = f"{ago((now() - entry.time).total_seconds())} ago"
            table.add_row(host, state, when, entry.kind, entry.what)
    console.print(table)


def add(entries: BadNodes, nodes: str, why: str) -> str:
    """Add nodes by hand; return what was done. nodes: in Slurm's form. Raises: ValueError."""
    named = _hosts("--add", nodes)
    try:
        for host in named:
            entries.add("by hand", host, why)
    except OSError as error:
        raise ValueError(f"{entries.folder} cannot be written: {error.strerror}") from None
    return f"jobs leave out {', '.join(named)}, until --clear"


def clear(entries: BadNodes, nodes: str) -> str:
    """Forget why nodes were bad; return what was done. nodes: in Slurm's form. Raises: ValueError."""
    named = _hosts("--clear", nodes)
    if unknown := [host for host in named if host not in entries.entries()]:
        known = ", ".join(entries.entries()) or "none"
        raise ValueError(f"--clear {', '.join(unknown)}: not among the nodes that were found bad: {known}")
    try:
        entries.clear(named)
    except OSError as error:
        raise ValueError(f"{entries.folder} cannot be written: {error.strerror}") from None
    return f"cleared {', '.join(named)}"


def for_sbatch(entries: BadNodes, needed: int) -> str:
    """Return sbatch's option for a job of so many nodes in the default partition; empty if none is bad."""
    out = spared(entries.bad(), cluster_nodes(""), needed)
    return f"--exclude={','.join(out)}" if out else ""


def _hosts(option: str, text: str) -> Sequence[str]:
    try:
        named = hosts(text)
    except ValueError:
        named = ()
    if not named or not all(re.fullmatch(r"\w[\w.-]*", host, re.ASCII) for host in named):
        raise ValueError(f"{option} {text}: expected names of nodes, as node7 or node[1-4,7]")
    return named
