"""What the nodes of a job must have in common, checked before anything is started; no torch.

The first node's agent compares what each says of itself, and all show each other a file in the run folder.
What ranks check (a reduction, a matrix product) is trainer/preflight.py's.
"""

import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

from qwenlora.configs import Config
from qwenlora.configs.load import to_yaml
from qwenlora.run.code import versions
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import code_hash

Facts = dict[str, Any]
SEEN_WITHIN_S = 10.0  # a parallel file system may show another node's file late
MOST_SKEW_S = 2.0
FILES_OF_A_CHECKPOINT = 16


def facts(config: Config, processes: int) -> Facts:
    """Return what a node says of itself."""
    return {
        "config": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "code": code_hash()[:12],
        "python": platform.python_version(),
        "versions": versions(),
        "processes": processes,
        "time": time.time(),
    }


def problems(mine: Facts, others: dict[str, Facts]) -> list[str]:
    """Return a line for each node that differs from this one. others: by host."""
    found = []
    for host, theirs in others.items():
        packages = (
            mine["versions"] | {"Python": mine["python"]},
            theirs["versions"] | {"Python": theirs["python"]},
        )
        differ = [
            f"{name} {packages[1].get(name)} (elsewhere {version})"
            for name, version in packages[0].items()
            if packages[1].get(name) != version
        ]
        if differ:
            found.append(
                f"{host} has other package versions: {', '.join(differ)}; install the same on all nodes"
            )
        elif theirs["code"] != mine["code"]:
            found.append(f"{host} has another qwenlora of the same version; install the same on all nodes")
        if theirs["config"] != mine["config"]:
            found.append(f"{host} reads another config; the config file must be the same on all nodes")
        if theirs["processes"] != mine["processes"]:
            found.append(
                f"{host} would run {theirs['processes']} processes, the first node {mine['processes']}; ask"
                " for the same number of GPUs on each node, or set launch.nproc_per_node"
            )
    return found


def show(run: RunFolder, node: int) -> str:
    """Put a file of this node into the run folder; return its text. Raises: OSError."""
    text = f"{platform.node()} {time.time_ns()}"
    file = _probe(run, node)
    file.write_text(text, encoding="utf-8")
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return text


def sees(run: RunFolder, node: int, text: str) -> bool:
    """Whether the file that a node showed is seen here."""
    end = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            list(run.path.iterdir())  # makes NFS ask again
            if _probe(run, node).read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def clear(run: RunFolder, nodes: int) -> None:
    """Remove the files that nodes showed."""
    for node in range(nodes):
        _probe(run, node).unlink(missing_ok=True)


def space(config: Config, run: RunFolder) -> str:
    """Return a warning when the disk has no room for the checkpoints to come, else nothing."""
    counted = run.read_facts().checkpoint_bytes
    limit = config.train.save_total_limit
    if config.train.save_strategy == "no" or limit is None:
        return ""
    missing = max(limit + 1 - len(run.checkpoints()), 1)  # one more is written before the oldest goes
    disk = os.statvfs(run.path)
    free, files = disk.f_bavail * disk.f_frsize, disk.f_favail
    if free < missing * counted:
        return (
            f"run_dir={run.path} has {free / 2**20:,.0f} MiB free, the {missing} checkpoints to come need"
            f" {missing * counted / 2**20:,.0f} MiB: free some, or lower train.save_total_limit ({limit})"
        )
    if 0 < files < missing * FILES_OF_A_CHECKPOINT:
        return (
            f"run_dir={run.path} has room for {files} more files only (inodes), the checkpoints to come need"
            " more"
        )
    return ""


def _probe(run: RunFolder, node: int) -> Path:
    return run.path / f".preflight-{node}"
