"""Where results go: a name that is taken is refused before any work; a folder gets its name when it is
whole."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from qwenlora.run.disk import free_bytes, settle, sync


def free_folder(out: Path, *, read: tuple[Path | str | None, ...] = ()) -> Path:
    """Return the folder (or .zip) to be made, absolute. read: folders that it is made from.

    Raises: ValueError when something is there, or when it would lie within what is read.
    """
    out = out.expanduser().absolute()
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} is there already; choose a name that is not there yet")
    for taken in (Path(folder) for folder in read if folder):
        if taken.is_dir() and out.resolve().is_relative_to(taken.resolve()):
            raise ValueError(f"{out} lies within {taken}, which is read here; choose a folder elsewhere")
    return out


def free_file(out: Path, option: str) -> Path:
    """Return a file to be written, absolute. option: what named it.

    Raises: ValueError when something is there, and when there is no folder for it that can be written.
    """
    out = out.expanduser().absolute()
    if out.is_symlink() or out.exists():
        raise ValueError(f"{option} {out} is there already; choose another name, or remove it")
    if not out.parent.is_dir():
        raise ValueError(f"{option} {out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{option} {out}: you may not write into {out.parent}")
    return out


@contextmanager
def staging(out: Path, size: int, pack: Callable[[Path], Path] | None = None) -> Iterator[Path]:
    """Make a folder beside out, which becomes out after the block, or is gone.

    Of a process that was killed the folder is left; the next to make out removes it.
    out: absolute, as free_folder() gives it. size: bytes it will need. pack: makes one file of the folder,
    beside it.
    Raises: ValueError when the disk has no room.
    """
    start = f"{out.name}.staging-{os.uname().nodename}-"
    made = out.parent / f"{start}{os.getpid()}"
    before = {caught: signal.signal(caught, _leave) for caught in (signal.SIGTERM, signal.SIGHUP)}
    size = 2 * size if pack else size  # the folder and its file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.iterdir():
            number = left.name.removeprefix(start).partition(".")[0]
            if left.name.startswith(start) and number.isdecimal() and not psutil.pid_exists(int(number)):
                _remove(left)
        free = free_bytes(out.parent)
        if size > free:
            raise ValueError(
                f"{out.parent} has {free / 1e9:.1f} GB free, {out.name} needs {size / 1e9:.1f} GB; make room,"
                " or name a folder on another disk"
            )
        made.mkdir()
        yield made
        settle(made)
        done = pack(made) if pack else made
        sync(done)
        done.rename(out)
        sync(out.parent)
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror or error}; name another place") from error
    finally:
        _remove_all(made)
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _remove_all(made: Path) -> None:
    """Remove the folder, and what was being packed of it."""
    with suppress(OSError):  # it may be the folder above that could not be made
        for left in made.parent.iterdir():
            if left.name == made.name or left.name.startswith(f"{made.name}."):
                _remove(left)


def _remove(path: Path) -> None:
    with suppress(OSError):  # what could not be made need not be removed
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
