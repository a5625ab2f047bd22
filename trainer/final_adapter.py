"""The adapter folder that a done run ends with, and its files that are the same in every checkpoint."""

import copy
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import GENERATION_CONFIG_NAME

from qwenlora.run import checkpoints
from qwenlora.run.disk import seal, settle, sync
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.saver import reason_of
from qwenlora.trainer.loop.state import in_file, not_finite
from qwenlora.trainer.model.endings import Settings, settings_text
from qwenlora.trainer.model.fused_lora import ADAPTER
from qwenlora.trainer.ranks.faults import TrainingFault


def constant_files(model: Any, tokenizer: Any, generation: Settings) -> dict[str, bytes]:
    """Return {name: content} of the adapter's config, the tokenizer and generation_config.json. model: a
    PeftModel."""
    with TemporaryDirectory() as folder:
        _save_settings(Path(folder), model)
        _save_words(Path(folder), tokenizer, generation)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def save_adapter(model: Any, tokenizer: Any, generation: Settings, run: RunFolder) -> None:
    """Write the final adapter, its tokenizer and generation_config.json, whole or not at all; an earlier
    adapter is replaced, its comparison renamed. model: a PeftModel. Raises: TrainingFault if it is not finite
    or not writable."""
    staging = run.path / ".adapter.staging"
    adapter = in_file(model)
    if broken := not_finite(adapter):
        raise TrainingFault(
            f"the last step made weights that are not finite ({broken}); no adapter was written"
        )
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()  # without its parents: a deleted run folder stays deleted
        copies = {name: tensor.detach().cpu().clone() for name, tensor in adapter.items()}  # some may share
        save_file(copies, staging / checkpoints.ADAPTER, metadata={"format": "pt"})
        _save_settings(staging, model)
        _save_words(staging, tokenizer, generation)
        seal(staging, but="adapter_config.json")  # it names the base's folder, which may move
        settle(staging)
        _put_in_place(staging, run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingFault(
            f"all steps are trained, but the adapter was not saved: {reason_of(error)}; the same command"
            " tries again"
        ) from error


def _save_settings(folder: Path, model: Any) -> None:
    adapter = copy.copy(model.peft_config[ADAPTER])
    adapter.inference_mode = True  # as peft's own save_pretrained writes it
    adapter.save_pretrained(folder)


def _save_words(folder: Path, tokenizer: Any, generation: Settings) -> None:
    tokenizer.save_pretrained(folder)
    (folder / GENERATION_CONFIG_NAME).write_text(settings_text(generation), encoding="utf-8")


def _put_in_place(staging: Path, run: RunFolder) -> None:
    if run.comparison.exists():  # of the earlier adapter
        run.comparison.replace(run.comparison.with_suffix(".old.json"))
    old = run.path / ".adapter.old"
    shutil.rmtree(old, ignore_errors=True)
    if run.adapter.exists():
        run.adapter.rename(old)
    staging.rename(run.adapter)
    sync(run.path)
    shutil.rmtree(old, ignore_errors=True)
