"""Writes checkpoints: staged, hashed, synced, renamed; in the background, on rank 0 alone. A failed save
costs only itself: its staging folder is removed, earlier checkpoints stay, training goes on. A save that
hangs ends the process."""

import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import ADAPTER, MANIFEST, OPTIMIZER
from qwenlora.run.disk import settle, sha256, sync
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import FileEntry, Identity
from qwenlora.trainer.loop.state import Snapshot, not_finite

log = logging.getLogger("qwenlora")


class Saver:
    """The only writer of checkpoints. in_background: in a thread; timeout_s: for one save, then give_up gets
    a message. failure: why the newest save failed, or empty; last_seconds: of the newest good save."""

    def __init__(
        self,
        run: RunFolder,
        identity: Identity,
        world_size: int,
        *,
        limit: int | None,
        in_background: bool,
        timeout_s: float,
        warn: Callable[[str], None] = log.warning,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.identity, self.world_size, self.limit = run, identity, world_size, limit
        self.in_background, self.timeout_s, self.warn, self.give_up = in_background, timeout_s, warn, give_up
        self.failure = ""
        self.last_seconds = 0.0
        self._constant: dict[str, bytes] = {}
        self._thread: threading.Thread | None = None

    def constant(self, files: dict[str, bytes]) -> None:
        """Set the files that are the same in every checkpoint: the adapter's config, the tokenizer."""
        self._constant = files

    def save(self, step: int, snapshot: Snapshot, texts: dict[str, str], losses: dict[int, float]) -> None:
        """Write checkpoint-<step>. Call wait() first: one save runs at a time, and reads the snapshot. texts:
        small files by name; losses: by which the best checkpoint is kept, see checkpoints.rotate()."""
        assert self._thread is None, "wait() first"
        arguments = (step, snapshot, texts, losses)
        if self.in_background:
            self._thread = threading.Thread(
                target=self._save, args=arguments, name=f"save-{step}", daemon=True
            )
            self._thread.start()
        else:
            self._save(*arguments)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the current save, if any, has ended."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _save(self, step: int, snapshot: Snapshot, texts: dict[str, str], losses: dict[int, float]) -> None:
        start = time.monotonic()
        folder = self.run.checkpoint(step)
        alarm = threading.Timer(self.timeout_s, self._give_up_on, [folder.name])
        alarm.daemon = True
        alarm.start()
        staging = folder.with_name(f".staging-{folder.name}")
        try:
            if broken := not_finite(snapshot.adapter):
                raise ValueError(f"its weights are not finite ({broken})")
            size = self._write(staging, step, snapshot, texts)
            checkpoints.remove(folder)  # an unfinished or earlier folder of this step
            staging.rename(folder)
            sync(self.run.path)
        except Exception as error:  # of any kind: nothing else would report an error of this thread
            log.info("saving %s failed", folder.name, exc_info=error)
            self.failure = f"{folder.name} was not saved: {reason_of(error)}"
            shutil.rmtree(staging, ignore_errors=True)
            folders = self.run.checkpoints()
            whole = [path.name for path in folders if not checkpoints.flaw(path, thorough=False)]
            self.warn(f"{self.failure}; the newest whole one is {whole[0] if whole else 'none'}")
        else:
            self.failure = ""
            self.last_seconds = time.monotonic() - start
            log.info("%s: %.1f MB written in %.3f s", folder.name, size / 1e6, self.last_seconds)
            self._rotate(losses)
        finally:
            alarm.cancel()

    def _rotate(self, losses: dict[int, float]) -> None:
        try:
            checkpoints.rotate(self.run, self.limit, losses)
        except OSError as error:
            self.warn(f"an old checkpoint could not be removed: {reason_of(error)}")

    def _write(self, staging: Path, step: int, snapshot: Snapshot, texts: dict[str, str]) -> int:
        """Write all files and, once they are on the disk, the manifest; return their size in bytes."""
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_file(snapshot.adapter, staging / ADAPTER, metadata={"format": "pt"})
        save_file(snapshot.optimizer, staging / OPTIMIZER)
        for name, content in self._constant.items():
            (staging / name).write_bytes(content)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        files = {
            file.name: FileEntry(bytes=file.stat().st_size, sha256=sha256(file)) for file in settle(staging)
        }
        if self.run.metrics.exists():
            sync(self.run.metrics)  # a resume does not log the steps before this one again
        manifest = staging / MANIFEST
        manifest.write_text(
            checkpoints.manifest_text(step, self.world_size, self.identity, files), encoding="utf-8"
        )
        sync(manifest)
        sync(staging)
        return sum(file.bytes for file in files.values()) + manifest.stat().st_size

    def _give_up_on(self, name: str) -> None:
        message = (
            f"{name} was not saved in checkpoint.timeout_s={self.timeout_s:g} s: the file system of"
            f" {self.run.path} hangs, or is too slow; the checkpoints before it are whole: the same command"
            " resumes"
        )
        log.error(message)
        if self.give_up:
            self.give_up(message)


def reason_of(error: Exception) -> str:
    """Return why a file could not be written."""
    if isinstance(error, OSError):
        where = f" ({Path(error.filename).name})" if error.filename else ""
        return f"{error.strerror or error}{where}"
    # safetensors' wording of an error of the system
    match = re.search(r"I/O error: (.+?) \(os error", str(error))
    return match.group(1) if match else str(error)
