"""Signs of life: each rank of a node writes over one small file when it comes further; the node's agent reads
them.

The folder is the node's own memory (/dev/shm where there is one), so that a thousand ranks cost a shared file
system nothing.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

STACKS_SIGNAL = (
    signal.SIGRTMIN + 7
)  # a rank that gets it writes its threads' stacks to its log; nobody else uses it
_WIDTH = 160  # bytes: written over in place, so it must not change


class Beat(NamedTuple):
    """A rank's last sign of life. beats: how many it gave, so who has fewer is behind; at:
    time.monotonic()."""

    rank: int
    pid: int
    step: int
    beats: int
    at: float


class Heart:
    """A rank's side. Without a folder (started by hand) it does nothing."""

    def __init__(self, folder: str, rank: int) -> None:
        self._rank, self._step, self._beats = rank, 0, 0
        self._descriptor = (
            os.open(Path(folder) / f"{rank}", os.O_WRONLY | os.O_CREAT, 0o600) if folder else -1
        )

    def beat(self, step: int | None = None) -> None:
        """Say that this rank has come further. step: the optimizer step that is under way, if it is another
        one."""
        if self._descriptor < 0:
            return
        self._step = self._step if step is None else step
        self._beats += 1
        beat = Beat(self._rank, os.getpid(), self._step, self._beats, time.monotonic())
        os.pwrite(self._descriptor, json.dumps(beat).ljust(_WIDTH).encode(), 0)


def make_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder of this node for its ranks' beats."""
    memory = Path("/dev/shm")  # noqa: S108 (the folder in it has a name of its own, and is closed to others)
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return tempfile.TemporaryDirectory(
        prefix="qwenlora-", dir=memory if usable else None, ignore_cleanup_errors=True
    )


def read(folder: str) -> list[Beat]:
    """Return the last beat of each rank of this node, by rank; those that gave none are missing."""
    beats = []
    for file in Path(folder).iterdir():
        try:
            beats.append(Beat(*json.loads(file.read_bytes())))
        except (OSError, ValueError, TypeError):  # opened, but nothing written yet
            continue
    return sorted(beats)
