"""Which checkpoints are whole, and which one to resume from.

A checkpoint is whole when it has the file `complete`, written after every rank has written its part.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from qwenlora.jobs.run import RunFolder

COMPLETE = "complete"
NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def begin(folder: Path, accelerator: Any) -> None:
    """Make way for a checkpoint: what an earlier, broken attempt left of it is removed before any rank writes."""
    if accelerator.is_main_process:
        remove(folder)
    accelerator.wait_for_everyone()


def finish(folder: Path, accelerator: Any, limit: int | None) -> None:
    """Mark a checkpoint as whole once every rank's files are on the disk; only then drop the oldest beyond limit."""
    for file in folder.iterdir():
        if file.is_file():
            _sync(file)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / COMPLETE).touch()
        _sync(folder / COMPLETE)
        _sync(folder)
        for old in RunFolder(folder.parent).checkpoints()[limit:] if limit else []:
            remove(old)


def choose(run: RunFolder, resume: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from and a line on each newer one passed over.

    resume: auto (the newest whole one, if any), none, or the name or path of one.
    Raises: ValueError when the one named is not whole, or there are only broken ones.
    """
    if resume == "none":
        if run.trained:
            raise ValueError(
                f"--resume none would train over what run_dir={run.path} holds; --fresh sets it aside and starts anew"
            )
        return None, []
    if resume != "auto":
        folder = run.path / resume if (run.path / resume).is_dir() else Path(resume).expanduser().absolute()
        if why := flaw(folder):
            raise ValueError(f"--resume {resume}: {folder} {why}")
        return folder, []
    passed_over: list[str] = []
    for folder in run.checkpoints():
        why = flaw(folder)
        if not why:
            return folder, passed_over
        passed_over.append(f"{folder.name} {why}")
    if passed_over:
        raise ValueError(
            f"no checkpoint in {run.path} can be resumed from: {'; '.join(passed_over)};"
            " --fresh sets this run aside and starts anew"
        )
    return None, []


def flaw(folder: Path) -> str:
    """Return why a checkpoint cannot be resumed from, or an empty text."""
    if not folder.is_dir():
        return "is no folder"
    if not (folder / COMPLETE).is_file():
        return "is not whole: its saving was cut off"
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    return f"lacks {', '.join(missing)}" if missing else ""


def remove(folder: Path) -> None:
    """Remove a folder, whole or broken, there or not."""
    (folder / COMPLETE).unlink(missing_ok=True)  # first: a removal cut short must not leave what looks whole
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
