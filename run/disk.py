"""Files that are seen whole or not at all, and are still there after a power cut."""

import hashlib
import os
import re
import shutil
from pathlib import Path

SUMS = "SHA256SUMS"  # as sha256sum writes it: `sha256sum --check SHA256SUMS` checks the folder, too


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
    """Wait until a folder's files are on the disk, give them the umask's permissions, and return them.
    Libraries that write through a temporary file leave it readable by its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    files = sorted(folder.iterdir())
    for file in files:
        file.chmod(0o666 & ~mask)
        sync(file)
    return files


def seal(folder: Path, *, but: str) -> None:
    """Write SHA256SUMS, the hashes of a folder's files. but: the file that people may edit."""
    files = sorted(file for file in folder.iterdir() if file.name not in (SUMS, but))
    (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")


def broken_seal(folder: Path) -> str:
    """Return which file of a sealed folder has changed, and how; empty when none has."""
    if not (folder / SUMS).is_file():
        return ""
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return f"has a {SUMS} that is damaged"
    for line in lines:
        if not (entry := re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)):
            return f"has a {SUMS} that is damaged"
        if not (folder / entry[2]).is_file():
            return f"lacks {entry[2]}"
        if sha256(folder / entry[2]) != entry[1]:
            return f"has {entry[2]} with other bytes than were written (SHA-256)"
    return ""


def free_bytes(folder: Path) -> int:
    """Return how many bytes may still be written to a folder's disk."""
    return shutil.disk_usage(folder).free


def free_files(folder: Path) -> int:
    """Return how many files a folder's disk can still take (inodes); 0 where it has no limit."""
    return os.statvfs(folder).f_favail


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in little memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
