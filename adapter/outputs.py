"""Places for results: a taken name is refused before any work; a folder gets its name once complete."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from qwenlora.run.disk import free_bytes, settle, sync
from qwenlora.run.signals import under_nohup


def free_folder(out: Path, *, read: tuple[Path | str | None, ...] = ()) -> Path:
    """Return out, absolute. Raises: ValueError when it is taken, or lies inside a folder that is read."""
    out = out.expanduser().absolute()
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} is there already; choose a name that is not there yet")
    for taken in (Path(folder) for folder in read if folder):
        if taken.is_dir() and out.resolve().is_relative_to(taken.resolve()):
            raise ValueError(f"{out} lies within {taken}, which is read here; choose a folder elsewhere")
    return out


def free_file(out: Path, option: str) -> Path:
    """Return out, absolute; option names it in the message. Raises: ValueError when taken or not writable."""
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
    """Make a folder beside out; after the block it becomes out, after an error it is removed.

    The folder of a killed process is removed by the next one that makes out. size: its bytes; pack: makes one
    file of the folder, beside it, and returns its path. Raises: ValueError when the disk is full.
    """
    prefix = f"{out.name}.staging-{os.uname().nodename}-"
    folder = out.parent / f"{prefix}{os.getpid()}"
    numbers = [signal.SIGTERM] if under_nohup() else [signal.SIGTERM, signal.SIGHUP]
    handlers = {number: signal.signal(number, _leave) for number in numbers}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out.parent, prefix)
        _check_space(out, 2 * size if pack else size)  # pack: the folder and its file
        folder.mkdir()
        yield folder
        settle(folder)
        result = pack(folder) if pack else folder
        sync(result)
        result.rename(out)
        sync(out.parent)
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror or error}; name another place") from error
    finally:
        _remove_all(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the staging folders and files that killed processes of this machine left."""
    for path in parent.iterdir():
        process = path.name.removeprefix(prefix).partition(".")[0]
        if path.name.startswith(prefix) and process.isdecimal() and not psutil.pid_exists(int(process)):
            _remove(path)


def _check_space(out: Path, size: int) -> None:
    free = free_bytes(out.parent)
    if size > free:
        raise ValueError(
            f"{out.parent} has {free / 1e9:.1f} GB free, {out.name} needs {size / 1e9:.1f} GB; make room, or"
            " name a folder on another disk"
        )


def _remove_all(folder: Path) -> None:
    """Remove a staging folder, and the file that is packed from it."""
    with suppress(OSError):  # the parent may be missing: making it may have failed
        for path in folder.parent.iterdir():
            if path.name == folder.name or path.name.startswith(f"{folder.name}."):
                _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it may not exist
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
