"""Folders that are built once, for everyone: keyed by content, built aside, renamed into place when whole.

No lock is relied on, since some shared file systems have none. Two builders at once waste work and nothing
else: the first rename wins. To spare the work, a builder leaves a claim beside the folder and touches it as
long as it lives; others wait for it, and take over when it is touched no more.
"""

import glob
import hashlib
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, Field

from qwenlora.run.disk import sha256, sync, write_atomically
from qwenlora.run.records import Record

INDEX = "index.json"
BEAT_S = 2.0
SILENT_S = 30.0  # network file systems may show a touch late
POLL_S = 0.2


class Index(Record):
    """A folder's index.json, written last. files: {name: (bytes, second of its last change)}."""

    files: dict[str, tuple[int, int]] = Field(default_factory=dict)


AnyIndex = TypeVar("AnyIndex", bound=Index)


class FileState(BaseModel, frozen=True):
    """Facts of a file that change when it does. ctime cannot be set back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class _FileDigest(Record):
    """The SHA-256 of a file's bytes, and the state in which it was hashed."""

    path: str
    state: FileState
    sha256: str


class _Claim(Record):
    """The process that builds a folder. token: tells one claim of a process from the next."""

    host: str
    pid: int
    token: str

    @property
    def is_dead(self) -> bool:
        """Whether its process ran on this machine and has ended."""
        return self.host == socket.gethostname() and not _is_alive(self.pid)

    @property
    def holder(self) -> str:
        """Its process, for messages."""
        return f"process {self.pid} on {self.host}"


def digest_of(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file's bytes, looked up when the file has not changed since it was hashed."""
    state = state_of(path)
    entry = cache / "files" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"
    try:
        known = _FileDigest.read(entry)
        if known.state == state:
            return known.sha256
    except (OSError, ValueError):
        pass  # not hashed before, or damaged: made anew
    digest = sha256(path)
    # a further change within the clock's tick would be missed: then it is not remembered
    settled = time.time_ns() - max(state.mtime_ns, state.ctime_ns) > 2e9
    if state_of(path) == state and settled:
        with suppress(OSError):  # preparation refuses a cache that cannot be written, with a clearer message
            entry.parent.mkdir(parents=True, exist_ok=True)
            known = _FileDigest(path=str(path.absolute()), state=state, sha256=digest)
            write_atomically(entry, known.text(indent=None))
    return digest


def state_of(path: Path) -> FileState:
    """Return the state of a file. Raises: OSError."""
    stat = path.stat()
    return FileState(
        size=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, inode=stat.st_ino
    )


def read_index(folder: Path, kind: type[AnyIndex]) -> AnyIndex | None:
    """Return the index of a whole folder; None when the folder, or a file of it, is missing or changed."""
    try:
        index = kind.read(folder / INDEX)
        whole = all(_size_and_second(folder / name) == entry for name, entry in index.files.items())
    except (OSError, ValueError):
        return None
    return index if whole else None


def _size_and_second(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, int(stat.st_mtime)  # finer times are not kept by every file system


def build_once(
    folder: Path,
    kind: type[AnyIndex],
    build: Callable[[Path], AnyIndex],
    say: Callable[[str], None] = lambda _: None,
) -> AnyIndex:
    """Return a folder's index; the folder is built now unless it exists or another process builds it.
    build: fills an empty folder and returns the index (an error leaves nothing); say: is called on a wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim = folder.with_name(f"{folder.name}.claim")
    while (index := read_index(folder, kind)) is None:
        with _claimed(claim) as ours:
            if ours:
                _build(folder, build)
            else:
                _wait(folder, claim, say)
    return index


def _build(folder: Path, build: Callable[[Path], AnyIndex]) -> None:
    _sweep(folder)
    staging = folder.with_name(
        f"{folder.name}.staging-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )
    broken = staging.with_name(f"{staging.name}-broken")
    staging.mkdir()
    try:
        index = build(staging)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in files:
            sync(path)
        entries = {str(path.relative_to(staging)): _size_and_second(path) for path in files}
        write_atomically(staging / INDEX, index.revised(files=entries).text(indent=None))
        if folder.exists() and not _is_whole(folder):
            folder.rename(broken)
        try:
            staging.rename(folder)
        except OSError:
            if not _is_whole(folder):
                raise
            # somebody else was faster, and that folder is as good as ours
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(broken, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    return read_index(folder, Index) is not None


def _sweep(folder: Path) -> None:
    """Remove the leftovers of killed builders of this machine, for any data."""
    mark = f".staging-{socket.gethostname()}-"
    for path in folder.parent.glob(f"*{glob.escape(mark)}*"):
        pid = path.name.partition(mark)[2].partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.parent.glob("*.claim"):
        claim = _parsed(_read(path))
        if claim and claim.is_dead:
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Yield true and keep the claim while the block runs; yield false when another process has it."""
    mine = _Claim(host=socket.gethostname(), pid=os.getpid(), token=uuid.uuid4().hex).text(indent=None)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            try:
                os.utime(path)
            except OSError:
                return  # taken over by a process that thought us dead

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        _remove(path, mine)


def _wait(folder: Path, path: Path, say: Callable[[str], None]) -> None:
    """Return when the folder is whole or nobody builds it any more. path: of the claim."""
    text = _read(path)
    claim = _parsed(text)
    holder = claim.holder if claim else "another process"  # whose claim is not written yet
    if text:
        say(f"waiting for {holder}, which prepares the same data")
    touched, since = _touched(path), time.monotonic()
    while not _is_whole(folder) and path.exists() and _read(path) == text:
        if (now := _touched(path)) != touched:
            touched, since = now, time.monotonic()
        if time.monotonic() - since > SILENT_S or (claim and claim.is_dead):
            say(f"{holder} has ended without finishing: preparing the data here")
            _remove(path, text)
            return
        time.sleep(POLL_S)


def _remove(path: Path, claim: str) -> None:
    """Remove a claim, unless another has replaced it."""
    if _read(path) == claim:
        path.unlink(missing_ok=True)


def _parsed(claim: str) -> _Claim | None:
    try:
        return _Claim.parse(claim)
    except ValueError:
        return None


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
