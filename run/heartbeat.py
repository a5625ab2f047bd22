"""Signs of life: each rank overwrites one small file when it makes progress; its node's agent reads them.

The folder is in the node's own memory (/dev/shm where there is one), so that a thousand ranks cost a shared
file system nothing.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# a rank that gets it writes its threads' stacks to its log; nobody else uses it
STACKS_SIGNAL = signal.SIGRTMIN + 7
_WIDTH = 160  # bytes: overwritten in place, so it must not change


class Beat(NamedTuple):
    """A rank's last sign of life. beats: their number, to see who is behind; at: time.monotonic()."""

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
        """Report progress. step: the optimizer step that is under way; None for the same as before."""
        if self._descriptor < 0:
            return
        self._step = self._step if step is None else step
        self._beats += 1
        beat = Beat(self._rank, os.getpid(), self._step, self._beats, time.monotonic())
        os.pwrite(self._descriptor, json.dumps(beat).ljust(_WIDTH).encode(), 0)


def make_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a new folder on this node for its ranks' beats."""
    memory = Path("/dev/shm")  # noqa: S108 (the folder in it has a name of its own, and others cannot read it)
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return tempfile.TemporaryDirectory(
        prefix="qwenlora-", dir=memory if usable else None, ignore_cleanup_errors=True
    )


def read_beats(folder: str) -> list[Beat]:
    """Return the last beat of each rank of this node, by rank; ranks without one are left out."""
    beats = []
    for file in Path(folder).iterdir():
        try:
            beats.append(Beat(*json.loads(file.read_bytes())))
        except (OSError, ValueError, TypeError):  # opened, not written yet
            continue
    return sorted(beats)
