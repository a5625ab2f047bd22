"""Keeps snapshots in the memory of this node's agent (run/snapshots.py), between two checkpoints on disk: in
the background, on the first rank of each node, so that whichever node is lost, another one has them."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from qwenlora.run import checkpoints, snapshots
from qwenlora.run.checkpoints import ADAPTER, OPTIMIZER
from qwenlora.run.hardware import free_memory
from qwenlora.run.records import FileEntry, Identity
from qwenlora.trainer.loop.saver import reason_of
from qwenlora.trainer.loop.state import Snapshot, not_finite


class Keeper:
    """Writes snapshots into the agent's files. constant: files that are the same in each of them."""

    def __init__(
        self, files: Sequence[str], identity: Identity, world_size: int, warn: Callable[[str], None]
    ) -> None:
        self.identity, self.world_size, self.warn = identity, world_size, warn
        self.constant: dict[str, bytes] = {}
        self._files = deque(map(Path, files))  # the one that is written next is the first
        self._thread: threading.Thread | None = None

    def can_keep(self) -> bool:
        """Whether another snapshot can be kept: none has failed."""
        self.wait()
        return bool(self._files)

    def keep(self, step: int, snapshot: Snapshot, texts: dict[str, str]) -> None:
        """Keep a snapshot, in place of the older of two. Call wait() before it is made: it is read until
        then. texts: small files by name."""
        assert self._thread is None, "wait() first"
        self._thread = threading.Thread(
            target=self._keep, args=(step, snapshot, texts), name=f"keep-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last snapshot is kept."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _keep(self, step: int, snapshot: Snapshot, texts: dict[str, str]) -> None:
        if not self._files:
            return
        file, size = self._files[0], sum(map(_bytes_of, (snapshot.adapter, snapshot.optimizer)))
        try:
            if broken := not_finite(snapshot.adapter):
                raise ValueError(f"its weights are not finite ({broken})")
            free = free_memory() + file.stat().st_size
            if free < 4 * size:  # two snapshots, and one while it is written
                raise ValueError(f"{free / 1e6:,.0f} MB of memory are free, it needs {4 * size / 1e6:,.0f}")
            contents = {name: text.encode() for name, text in texts.items()} | self.constant
            contents[ADAPTER] = save(snapshot.adapter, metadata={"format": "pt"})
            contents[OPTIMIZER] = save(snapshot.optimizer)
            files = {
                name: FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
                for name, content in contents.items()
            }
            manifest = checkpoints.manifest_text(step, self.world_size, self.identity, files)
            snapshots.write(file, contents, manifest)
        except Exception as error:  # of any kind: nothing else would report an error of this thread
            self._files.clear()
            self.warn(f"no more snapshots in memory: {reason_of(error)}; a restart uses the last checkpoint")
        else:
            self._files.rotate(-1)


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
