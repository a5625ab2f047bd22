"""What a spare node does while it waits: it reads the base, so that its ranks will find that in memory."""

import threading
from contextlib import suppress
from pathlib import Path

from qwenlora.plan.bases import folder_of
from qwenlora.run.folder import RunFolder

WEIGHTS = (".safetensors", ".bin")
CHUNK_BYTES = 2**24


def warm(run: RunFolder) -> None:
    """Begin to read the run's base."""
    threading.Thread(target=_read_base, args=(run,), name="spare", daemon=True).start()


def _read_base(run: RunFolder) -> None:
    with suppress(OSError, ValueError):  # then ranks read it when they need it
        folder = folder_of(run.read_facts().base, run.read_config().model.revision)
        for file in folder.iterdir() if folder else ():
            if file.suffix in WEIGHTS:
                _read(file)


def _read(file: Path) -> None:
    """Read a file, for the kernel to keep it in its page cache."""
    chunk = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(chunk):
            pass
