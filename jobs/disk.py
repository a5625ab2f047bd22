"""Files that are seen whole or not at all, and are still there after a power cut."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is seen whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path) -> list[Path]:
    """Wait until all files of a folder are on the disk, and open them to those whom the umask lets in; return them.

    Libraries that write by way of a temporary file leave it closed to everyone else.
    """
    mask = os.umask(0)
    os.umask(mask)
    files = sorted(folder.iterdir())
    for file in files:
        file.chmod(0o666 & ~mask)
        sync(file)
    return files


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in little memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
