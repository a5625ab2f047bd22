"""The checks of the agents before ranks start, without torch; those of the ranks are in trainer/ranks."""

import hashlib
import os
import platform
import time
from pathlib import Path

from qwenlora.configs import Config
from qwenlora.configs.load import to_yaml
from qwenlora.launch.messages import NodeFacts
from qwenlora.plan.plan import FILES_PER_CHECKPOINT
from qwenlora.run.code import versions
from qwenlora.run.disk import free_bytes, free_files
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import code_hash

SEEN_WITHIN_S = 10.0  # a parallel file system may show another node's file late
MAX_CLOCK_SKEW_S = 2.0


def facts_of_this_node(config: Config, processes: int) -> NodeFacts:
    """Return what this node tells the first one."""
    return NodeFacts(
        config=hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        code=code_hash()[:12],
        python=platform.python_version(),
        versions=versions(),
        processes=processes,
        time=time.time(),
    )


def differences(mine: NodeFacts, others: dict[str, NodeFacts]) -> list[str]:
    """Return a line for each difference between this node and the others. others: by host."""
    lines = []
    here = mine.versions | {"Python": mine.python}
    for host, theirs in others.items():
        there = theirs.versions | {"Python": theirs.python}
        packages = [
            f"{name} {there.get(name)} (elsewhere {version})"
            for name, version in here.items()
            if there.get(name) != version
        ]
        if packages:
            lines.append(
                f"{host} has other package versions: {', '.join(packages)}; install the same on all nodes"
            )
        elif theirs.code != mine.code:
            lines.append(f"{host} has another qwenlora of the same version; install the same on all nodes")
        if theirs.config != mine.config:
            lines.append(f"{host} reads another config; the config file must be the same on all nodes")
        if theirs.processes != mine.processes:
            lines.append(
                f"{host} would run {theirs.processes} processes, the first node {mine.processes}; ask for the"
                " same number of GPUs on each node, or set launch.nproc_per_node"
            )
    return lines


def write_file(run: RunFolder, node: int) -> str:
    """Write this node's file into the run folder; return its text. Raises: OSError."""
    text = f"{platform.node()} {time.time_ns()}"
    file = _file_of(run, node)
    file.write_text(text, encoding="utf-8")
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return text


def sees_file(run: RunFolder, node: int, text: str) -> bool:
    """Whether this node sees the file that another node wrote, with the same text."""
    end = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            list(run.path.iterdir())  # makes NFS ask its server again
            if _file_of(run, node).read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def remove_files(run: RunFolder, nodes: int) -> None:
    """Remove the files that nodes wrote."""
    for node in range(nodes):
        _file_of(run, node).unlink(missing_ok=True)


def space_warning(config: Config, run: RunFolder) -> str:
    """Return a warning when the disk has no room for the checkpoints to come, else an empty text."""
    limit = config.train.save_total_limit
    if config.train.save_strategy == "no" or limit is None:
        return ""
    to_come = max(limit + 1 - len(run.checkpoints()), 1)  # one more is written before the oldest goes
    needed, free, files = (
        to_come * run.read_facts().checkpoint_bytes,
        free_bytes(run.path),
        free_files(run.path),
    )
    if free < needed:
        return (
            f"run_dir={run.path} has {free / 2**20:,.0f} MiB free, the {to_come} checkpoints to come need"
            f" {needed / 2**20:,.0f} MiB: free some, or lower train.save_total_limit ({limit})"
        )
    if 0 < files < to_come * FILES_PER_CHECKPOINT:
        return (
            f"run_dir={run.path} has room for only {files} more files (inodes), the checkpoints to come need"
            " more"
        )
    return ""


def _file_of(run: RunFolder, node: int) -> Path:
    return run.path / f".preflight-{node}"
