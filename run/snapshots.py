"""The newest states of a run in the memory of each node, between two checkpoints on disk. The agent holds
them, its first rank writes them. When an attempt has failed, the agent that leads writes the newest whole one
to the run folder: from there on it is a checkpoint like any other.

The files have no names: they are gone as soon as the agent and its ranks are, whatever ends them.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import MANIFEST
from qwenlora.run.disk import settle, sync
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.run.records import Manifest

EVERY_S = 20.0  # by default, about
KEPT = 2  # so that one is whole while the other is written


class Snapshots:
    """The agent's side: files in memory, and what becomes of them."""

    def __init__(self) -> None:
        self._files = [os.memfd_create(f"qwenlora-snapshot-{number}") for number in range(KEPT)]

    def close(self) -> None:
        """Free the memory."""
        for file in self._files:
            os.close(file)

    @property
    def paths(self) -> tuple[str, ...]:
        """By which other processes of this user reach the files while this process lives."""
        return tuple(f"/proc/{os.getpid()}/fd/{file}" for file in self._files)

    def save_newest(self, run: RunFolder) -> tuple[str, list[str]]:
        """Write the newest whole snapshot to the run folder, if no whole checkpoint there is as new. Return
        the checkpoint's name, empty without one; and why snapshots were not used."""
        on_disk = next((step_of(folder) for folder in run.checkpoints() if not checkpoints.flaw(folder)), 0)
        problems: list[str] = []
        steps = [(_step(Path(path), problems), path) for path in self.paths]
        for step, path in sorted(steps, reverse=True):
            if step <= on_disk:
                break
            try:
                why = _save(Path(path), run, step)
            except OSError as error:
                why = f"cannot be written to {run.path}: {error.strerror or error}"
            if not why:
                return run.checkpoint(step).name, problems
            problems.append(f"the snapshot of step {step} in memory {why}")
        return "", problems


def write(file: Path, contents: Mapping[str, bytes], manifest: str) -> None:
    """Write a checkpoint's files into one. The manifest comes last: without it, a snapshot is not whole."""
    with file.open("r+b") as memory:
        memory.truncate(0)
        with tarfile.open(fileobj=memory, mode="w") as archive:
            for name, content in (*contents.items(), (MANIFEST, manifest.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _step(file: Path, problems: list[str]) -> int:
    """Return a snapshot's step; 0 if there is none, or none that is whole, which is added to problems."""
    if not file.stat().st_size:
        return 0
    try:
        with tarfile.open(file) as archive:
            manifest = archive.extractfile(MANIFEST)
            assert manifest, "a file"
            return Manifest.parse(manifest.read()).step
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError):
        problems.append("a snapshot in memory is not whole")
        return 0


def _save(file: Path, run: RunFolder, step: int) -> str:
    """Write a snapshot to disk as a checkpoint; return why it is not whole, then nothing stays. Raises:
    OSError."""
    folder = run.checkpoint(step)
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content, "a file"
                (staging / Path(member.name).name).write_bytes(content.read())
        if why := checkpoints.flaw(staging):
            return why
        settle(staging)
        sync(staging)
        checkpoints.remove(folder)  # one that is not whole
        staging.rename(folder)
        sync(run.path)
    except (tarfile.TarError, EOFError) as error:
        return f"is not whole: {error}"
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ""
