"""Folders that are built once, for everyone: keyed by content, built aside, renamed into place when whole.

No lock is relied on, since some shared file systems have none. Two builders at once waste work and nothing
else: the first rename wins. To spare the work, a builder leaves a claim beside the folder and touches it as
long as it lives; others wait for it, and take over when it falls silent.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from qwenlora.run.disk import sync, write_atomically

INDEX = "index.json"
BEAT_S = 2.0
SILENT_S = 30.0  # network file systems may show a touch late
POLL_S = 0.2


def digest_of(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file's bytes; looked up, when the file is as it was when it was last asked for.

    "As it was" is size, inode and the times of change to the nanosecond. ctime cannot be set back.
    """
    state = state_of(path)
    entry = cache / "files" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked for before, or damaged: then it is made anew
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    # a change within the clock's tick after it would look the same: then it is not remembered
    settled = time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > 2e9
    if state_of(path) == state and settled:
        with suppress(OSError):  # a cache that cannot be written is refused when rows are, in better words
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                entry, json.dumps({"path": str(path.absolute()), "state": state, "sha256": found})
            )
    return found


def state_of(path: Path) -> dict[str, int]:
    """Return what changes when a file does."""
    stat = path.stat()
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return a whole folder's index.json; None when the folder is not there, or has lost something.

    The index holds {"files": {name: [bytes, second of its last change]}}, and whatever its builder returned.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = all(_size_and_second(folder / name) == found for name, found in index["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return index if whole else None


def _size_and_second(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, int(stat.st_mtime)]  # finer times are not kept by every file system


def build_once(
    folder: Path, build: Callable[[Path], dict[str, Any]], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Return the index of a folder, which build fills unless someone has done so, or is doing so.

    build: gets an empty folder, returns what the index shall hold; whatever it raises is raised, and leaves
    nothing.
    say: hears, once, for whom this waits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim = folder.with_name(f"{folder.name}.claim")
    while (index := read_index(folder)) is None:
        with _claimed(claim) as ours:
            if ours:
                _build(folder, build)
            else:
                _wait(folder, claim, say)
    return index


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    _sweep(folder)
    staging = folder.with_name(
        f"{folder.name}.staging-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )
    staging.mkdir()
    try:
        index = build(staging)
        written = [path for path in staging.rglob("*") if path.is_file()]
        for path in written:
            sync(path)
        index["files"] = {str(path.relative_to(staging)): _size_and_second(path) for path in written}
        write_atomically(staging / INDEX, json.dumps(index, ensure_ascii=False))
        if folder.exists() and read_index(folder) is None:  # it lost a file
            folder.rename(staging.with_name(f"{staging.name}-broken"))
        try:
            staging.rename(folder)
        except OSError:
            if read_index(folder) is None:
                raise
            # another one was faster, and its folder is as good as ours
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(staging.with_name(f"{staging.name}-broken"), ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed builders of this machine left behind, of whatever data."""
    mark = f".staging-{socket.gethostname()}-"
    for path in folder.parent.glob(f"*{glob.escape(mark)}*"):
        pid = path.name.partition(mark)[2].partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    for claim in folder.parent.glob("*.claim"):
        holder = _holder(_read(claim))
        if holder and holder[1] and not _alive(holder[1]):
            claim.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _claimed(claim: Path) -> Iterator[bool]:
    """Hold the claim while the block runs; false when it is another's."""
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex})
    try:
        with claim.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            try:
                os.utime(claim)
            except OSError:
                return  # taken over by one that thought us dead

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        if _read(claim) == mine:
            claim.unlink(missing_ok=True)


def _wait(folder: Path, claim: Path, say: Callable[[str], None]) -> None:
    """Return when the folder is whole or nobody builds it any more."""
    held = _read(claim)
    who, pid = _holder(held) or ("another process", None)  # whose claim is not written yet
    if held:
        say(f"waiting for {who}, which prepares the same data")
    seen, since = _touched(claim), time.monotonic()
    while read_index(folder) is None and _read(claim) == held and claim.exists():
        if (touched := _touched(claim)) != seen:
            seen, since = touched, time.monotonic()
        if time.monotonic() - since > SILENT_S or (pid and not _alive(pid)):
            say(f"{who} has ended without finishing: preparing the data here")
            if _read(claim) == held:
                claim.unlink(missing_ok=True)
            return
        time.sleep(POLL_S)


def _holder(claim: str) -> tuple[str, int | None] | None:
    """Return who holds a claim, in words, and the pid when it is of this machine."""
    try:
        holder = json.loads(claim)
        pid = int(holder["pid"]) if holder["host"] == socket.gethostname() else None
        return f"process {holder['pid']} on {holder['host']}", pid
    except (ValueError, KeyError, TypeError):
        return None


def _touched(claim: Path) -> int:
    try:
        return claim.stat().st_mtime_ns
    except OSError:
        return 0


def _read(claim: Path) -> str:
    try:
        return claim.read_text(encoding="utf-8")
    except OSError:
        return ""
