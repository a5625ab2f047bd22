"""Which checkpoints are whole, and which one to resume from.

A checkpoint is whole when it has the file `complete`, written after every rank has written its part. It holds
{"step", "world_size", "files": {name: bytes}, "identity": {"config", "data", "base"}}: a checkpoint with a file
missing or cut short is not whole, and one of another run is not resumed from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwenlora.configs import Config
from qwenlora.jobs.disk import sync, write_atomically
from qwenlora.jobs.run import RunFolder, changes, step_of

COMPLETE = "complete"


def identity_of(config: Config, data: str, base: str) -> dict[str, Any]:
    """Return what a checkpoint belongs to. data, base: hashes of the prepared rows and of the base's weights."""
    return {"config": config.model_dump(mode="json"), "data": data, "base": base}


def begin(folder: Path, accelerator: Any) -> bool:
    """Make way for a checkpoint; return false when it is there already, whole.

    What a broken attempt left of it is removed before any rank writes.
    """
    there = not flaw(folder)
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process and not there:
        remove(folder)
    accelerator.wait_for_everyone()
    return not there


def finish(folder: Path, accelerator: Any, identity: dict[str, Any], limit: int | None) -> None:
    """Mark a checkpoint as whole once every rank's files are on the disk; only then drop the oldest beyond limit."""
    for file in folder.iterdir():
        sync(file)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {
            "step": step_of(folder),
            "world_size": accelerator.num_processes,
            "files": {file.name: file.stat().st_size for file in folder.iterdir()},
            "identity": identity,
        }
        write_atomically(folder / COMPLETE, json.dumps(record, indent=1))
        sync(folder)
        whole = [path for path in RunFolder(folder.parent).checkpoints() if not flaw(path)]
        for old in whole[limit:] if limit else []:
            remove(old)


def choose(run: RunFolder, resume: str, identity: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from and a line on each newer one passed over.

    resume: auto (the newest whole one, if any), none, or the name or path of one.
    Raises: ValueError when the one named is not whole or another run's, or there are only broken ones.
    """
    if resume == "none":
        if run.trained:
            raise ValueError(
                f"--resume none would train over what run_dir={run.path} holds; --fresh sets it aside and starts anew"
            )
        return None, []
    if resume != "auto":
        folder = run.path / resume if resume.startswith("checkpoint-") else Path(resume).expanduser().absolute()
        if not folder.is_dir():
            names = ", ".join(path.name for path in run.checkpoints()) or "no checkpoint"
            raise ValueError(f"--resume {resume}: there is no {folder}; this run has {names}")
        if why := flaw(folder) or _stranger(folder, identity):
            raise ValueError(f"--resume {resume}: {folder} {why}")
        return folder, []
    passed_over: list[str] = []
    for folder in run.checkpoints():
        why = flaw(folder) or _stranger(folder, identity)
        if not why:
            return folder, passed_over
        passed_over.append(f"{folder.name} {why}")
    if passed_over:
        raise ValueError(
            f"no checkpoint in {run.path} can be resumed from: {'; '.join(passed_over)};"
            " --fresh sets this run aside and starts anew"
        )
    return None, []


def set_aside_newer(run: RunFolder, step: int) -> None:
    """Rename the checkpoints past step, which a resume from there abandons, so that none is taken for this run's."""
    for folder in run.checkpoints():
        if step_of(folder) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            remove(aside)
            folder.rename(aside)


def read(folder: Path) -> dict[str, Any]:
    """Return the record of a whole checkpoint."""
    record: dict[str, Any] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    return record


def flaw(folder: Path) -> str:
    """Return why a checkpoint cannot be resumed from, or an empty text."""
    if not folder.is_dir():
        return "is no folder"
    if not (folder / COMPLETE).is_file():
        return "is not whole: its saving was cut off"
    for name, size in read(folder)["files"].items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if (found := (folder / name).stat().st_size) != size:
            return f"has {name} of {found} bytes, {size} were written"
    return ""


def remove(folder: Path) -> None:
    """Remove a folder, whole or broken, there or not."""
    (folder / COMPLETE).unlink(missing_ok=True)  # first: a removal cut short must not leave what looks whole
    shutil.rmtree(folder, ignore_errors=True)


def _stranger(folder: Path, identity: dict[str, Any]) -> str:
    """Return why a whole checkpoint is not this run's, or an empty text."""
    theirs = read(folder)["identity"]
    try:
        config = Config.model_validate_json(json.dumps(theirs["config"]))
    except ValidationError:
        return "was written with a config that this version of qwenlora does not know"
    if changed := changes(config, Config.model_validate_json(json.dumps(identity["config"]))):
        return f"is of another config: {changed}"
    if theirs["data"] != identity["data"]:
        return "was trained on other data"
    if theirs["base"] != identity["base"]:
        return "was trained on a base model with other weights"
    return ""
