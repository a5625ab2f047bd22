"""Checkpoints: what they hold, which of them are whole, and which one to resume from.

checkpoint-200/
    adapter_model.safetensors, adapter_config.json, tokenizer files: an adapter folder that plain peft loads;
        in float32, the weights that the optimizer continues from
    optimizer.safetensors: the optimizer's state, `<parameter's name>/<exp_avg ...>`
    state.json: everything else that a resume needs (records.py, State)
    trainer_state.json: transformers' own, without its log, which is metrics.jsonl
    manifest.json: records.py, Manifest; a folder that matches it is a checkpoint

The frozen base is never in it. trainer/loop/saver.py writes checkpoints, trainer/loop/state.py reads tensors;
docs/checkpoints.md has the promises.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from qwenlora.configs import Config
from qwenlora.configs.schema import Lora
from qwenlora.run.changes import Changes, allows, changes
from qwenlora.run.disk import sha256
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.run.records import FileEntry, Identity, Manifest, State

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
Numbers = npt.NDArray[Any]


class Chosen(NamedTuple):
    """The checkpoint to resume from, if any. passed_over: newer ones, and why; changed: permitted changes."""

    folder: Path | None
    passed_over: list[str]
    changed: str


def identity_of(config: Config, data: str, base: str) -> Identity:
    """Return the run's identity for checkpoints. data, base: hashes of prepared rows and base weights."""
    return Identity(config=config.model_dump(mode="json", by_alias=True), data=data, base=base)


def manifest_text(step: int, world_size: int, identity: Identity, files: dict[str, FileEntry]) -> str:
    """Return the manifest of a checkpoint, signed."""
    config = json.dumps(identity.config, sort_keys=True)
    record = Manifest(
        step=step,
        world_size=world_size,
        identity=identity,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        files=files,
    )
    return _signed(record.model_dump(mode="json", exclude={"sha256"}))


def _signed(record: dict[str, Any]) -> str:
    """Return a manifest as text, with a hash of itself: nothing else would notice a bit flipped in it."""
    digest = hashlib.sha256(json.dumps(record, indent=1, ensure_ascii=False).encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path) -> Manifest:
    """Return a checkpoint's manifest. Raises: ValueError saying what is wrong, without the folder's name."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"has no {MANIFEST}{_of_others(folder)}")
    try:
        text = file.read_text(encoding="utf-8")
        record = json.loads(text)
        # compared as text: the order, and fields that an older version left out, count, too
        whole = _signed({key: value for key, value in record.items() if key != "sha256"}) == text
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"has a {MANIFEST} that is damaged")
    if record["format"] != Manifest.FORMAT:
        raise ValueError(
            f"has format {record['format']}, this version of qwenlora reads format {Manifest.FORMAT}"
        )
    return Manifest.parse(text)


def read_state(folder: Path) -> State:
    """Return the state that a resume needs besides tensors. Raises: OSError or ValueError."""
    return State.parse(content(folder, STATE))


def content(folder: Path, name: str) -> bytes:
    """Return the bytes of a checkpoint's file. Raises: ValueError when their hash is not the manifest's."""
    read_bytes = (folder / name).read_bytes()
    if hashlib.sha256(read_bytes).hexdigest() != read(folder).files[name].sha256:
        raise ValueError(f"{folder} has {name} with other bytes than were written (SHA-256)")
    return read_bytes


def flaw(folder: Path, *, thorough: bool = True) -> str:
    """Return why a folder is not a whole checkpoint, or an empty text. thorough: hash every byte."""
    if not folder.is_dir():
        return "is no folder"
    try:
        manifest = read(folder)
        if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{manifest.step}":
            return f"is checkpoint-{manifest.step} by another name"
        flaws = (_file_flaw(folder / name, entry, thorough) for name, entry in manifest.files.items())
        return next(filter(None, flaws), "") or (adapter_flaw(folder) if thorough else "")
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _file_flaw(file: Path, written: FileEntry, thorough: bool) -> str:
    """Return how a checkpoint's file differs from its manifest entry, or an empty text."""
    if not file.is_file():
        return f"lacks {file.name}"
    if (size := file.stat().st_size) != written.bytes:
        return f"has {file.name} of {size} bytes, {written.bytes} were written"
    if thorough and sha256(file) != written.sha256:
        return f"has {file.name} with other bytes than were written (SHA-256)"
    return ""


def adapter_flaw(folder: Path) -> str:
    """Return why an undamaged adapter is not fit to resume from, or an empty text."""
    try:
        tensors = load_safetensors((folder / ADAPTER).read_bytes())
    except (SafetensorError, TypeError) as error:
        return f"has {ADAPTER} that cannot be read: {error}"
    for name, values in sorted(tensors.items()):
        if not np.isfinite(values).all():
            return f"has numbers in its adapter that are not finite ({name})"
    lora_b = _trained_b(folder, tensors)
    if lora_b and State.read(folder / STATE).moved and not any(values.any() for values in lora_b):
        return "has an adapter that is all zero (every lora_B), though it was trained"
    return ""


def _trained_b(folder: Path, tensors: Mapping[str, Numbers]) -> list[Numbers]:
    """Return what was trained of each lora_B, without its beginning, which is never zero."""
    lora_b = [values for name, values in tensors.items() if "lora_B" in name]
    lora = Lora.model_construct(**read(folder).identity.config.get("lora", {}))
    return [np.split(values, 2, axis=1)[0] for values in lora_b] if lora.takes_from_base else lora_b


def _of_others(folder: Path) -> str:
    """Return how to use a folder that is no checkpoint of this version, or an empty text."""
    if (folder / STATE).is_file():  # it is one, and damaged
        return ""
    if (folder / "adapter_config.json").is_file():
        what, cure = "an adapter", f"lora.init_from={folder} and a new run_dir train it further"
    elif (folder / "config.json").is_file():
        what, cure = "a whole model", f"model.name_or_path={folder} and a new run_dir train an adapter on it"
    else:
        return ""
    if (folder / "trainer_state.json").is_file():
        what += " that transformers' Trainer, TRL or an older qwenlora saved"
    return f": it is {what}; {cure}"


def choose(run: RunFolder, resume: str, identity: Identity, allowed: Sequence[str] = ()) -> Chosen:
    """Return the checkpoint to resume from. resume: auto (newest whole one, if any), none, a name or a path.
    Raises: ValueError when the named one is broken or another run's, or when all are broken."""
    if resume == "none":
        return Chosen(None, [], "")
    if resume != "auto":
        folder = named(run, resume, identity.config, allowed)
        if why := flaw(folder):
            raise ValueError(
                f"--resume {resume}: {folder} {why}; name another, or --resume auto takes the newest"
            )
        return Chosen(folder, [], _permitted_changes(folder, identity, allowed))
    passed_over: list[str] = []
    for folder in run.checkpoints():
        why = flaw(folder)
        if not why:
            return Chosen(folder, passed_over, _permitted_changes(folder, identity, allowed))
        passed_over.append(f"{folder.name} {why}")
    if passed_over:
        raise ValueError(
            f"no checkpoint in {run.path} can be resumed from: {'; '.join(passed_over)}; --fresh sets this"
            " run aside and starts anew"
        )
    return Chosen(None, [], "")


def named(run: RunFolder, resume: str, config: dict[str, Any], allowed: Sequence[str] = ()) -> Path:
    """Return the folder that --resume names: in the run folder, or a path. Only its manifest is read.
    Raises: ValueError when it does not exist, is no checkpoint, or was written with another config."""
    inside, outside = run.path / resume, Path(resume).expanduser().absolute()
    folder = inside if inside.is_dir() else outside
    if not folder.is_dir():
        names = ", ".join(path.name for path in run.checkpoints()) or "no checkpoint"
        looked = " and no ".join(dict.fromkeys([str(inside), str(outside)]))
        raise ValueError(f"--resume {resume}: there is no {looked}; this run has {names}")
    if theirs := RunFolder(folder).checkpoints():
        there = ", ".join(path.name for path in theirs)
        raise ValueError(f"--resume {resume}: {folder} is a run, not one of its checkpoints: {there}")
    try:
        record = read(folder)
    except ValueError as why:
        raise ValueError(
            f"--resume {resume}: {folder} {why}; name another, or --resume auto takes the newest"
        ) from None
    _refuse_another_config(folder, record.identity.config, config, allowed)
    return folder


def _refuse_another_config(
    folder: Path, theirs: dict[str, Any], ours: dict[str, Any], allowed: Sequence[str]
) -> Changes:
    """Return how the config has changed since a checkpoint. Raises: ValueError when it must not."""
    try:
        then = Config.model_validate_json(json.dumps(theirs))
    except ValidationError:
        raise ValueError(
            f"{folder} was written with a config that this version of qwenlora does not know"
        ) from None
    changed = changes(then, Config.model_validate_json(json.dumps(ours)))
    if refused := changed.refused(allowed):
        raise ValueError(f"{folder} is of another config: {refused}; to go on all the same: {refused.permit}")
    return changed


def _permitted_changes(folder: Path, identity: Identity, allowed: Sequence[str]) -> str:
    """Return the permitted changes since a checkpoint. Raises: ValueError when it is another run's."""
    theirs = read(folder).identity
    changed = _refuse_another_config(folder, theirs.config, identity.config, allowed)
    if theirs.data != identity.data and not allows("data", allowed):
        raise ValueError(
            f"{folder} was trained on other data; to go on all the same: --allow-config-change data"
        )
    if theirs.base != identity.base and not allows("model", allowed):
        raise ValueError(
            f"{folder} was trained on a base model with other weights; to go on all the same:"
            " --allow-config-change model"
        )
    return str(changed)


def set_aside_newer(run: RunFolder, step: int) -> list[str]:
    """Rename the checkpoints past a step, which a resume from there abandons; return their new names."""
    names = []
    for folder in run.checkpoints():
        if step_of(folder) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            remove(aside)
            folder.rename(aside)
            names.append(aside.name)
    return names


def clear_leftovers(run: RunFolder) -> None:
    """Remove checkpoints that a killed attempt left half written or removed; give whole ones their name."""
    for staging in run.path.glob(".staging-checkpoint-*"):
        folder = run.path / staging.name.removeprefix(".staging-")
        if not folder.exists() and not flaw(staging) and read(staging).step == step_of(folder):
            staging.rename(folder)
    for pattern in (".staging-checkpoint-*", ".removing-checkpoint-*"):
        for folder in run.path.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def rotate(run: RunFolder, limit: int | None, losses: dict[int, float]) -> None:
    """Remove the oldest whole checkpoints beyond limit, but neither the newest nor the best.
    losses: {step: eval_loss}, empty if the best does not matter. A limit of 1 keeps both best and newest."""
    whole = [folder for folder in run.checkpoints() if not flaw(folder, thorough=False)]
    kept = whole[: limit or None]
    best = next(iter(_best_first(whole, losses)), None)
    if best and best not in kept:
        kept = [*kept[: max(len(kept) - 1, 1)], best]
    for folder in whole:
        if folder not in kept:
            remove(folder)


def best(run: RunFolder, losses: dict[int, float]) -> Path | None:
    """Return the whole checkpoint with the lowest loss, of equal ones the first; None if there is none.
    losses: {step: eval_loss}."""
    return next((folder for folder in _best_first(run.checkpoints(), losses) if not flaw(folder)), None)


def best_first(losses: dict[int, float]) -> list[int]:
    """Return steps, those with the lowest loss first, of equal ones the earliest. losses: {step: eval_loss};
    one that is no number comes last."""
    return sorted(sorted(losses), key=lambda step: (math.isnan(losses[step]), losses[step]))


def _best_first(folders: list[Path], losses: dict[int, float]) -> list[Path]:
    of_step = {step_of(folder): folder for folder in folders}
    return [of_step[step] for step in best_first(losses) if step in of_step]


def remove(folder: Path) -> None:
    """Remove a checkpoint if it exists. It is renamed first, so that nobody sees half a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f".removing-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
