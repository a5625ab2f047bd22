"""Whether an adapter has the names and shapes that peft makes on torch's meta device, from the base's
config.json. ordinary.py knows them without peft where nothing is unusual."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from qwenlora.adapter.subject import ADAPTER_CONFIG, Subject
from qwenlora.run.format import and_more, shape
from qwenlora.trainer.model.headers import TensorValues
from qwenlora.trainer.model.pretrained import load_config_of


def check_shapes(subject: Subject, file: Path, weights: Mapping[str, TensorValues]) -> str:
    """Return the base's architecture. Raises: ValueError unless peft makes the same names and shapes."""
    base = load_config_of(subject.config, subject.base)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            base, trust_remote_code=subject.config.model.trust_remote_code
        )
        try:
            settings: Any = PeftConfig.from_pretrained(str(subject.adapter))
            settings.init_lora_weights = True  # of numbers that are not there
            model = get_peft_model(model, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file.parent / ADAPTER_CONFIG} does not fit {subject.base}: {str(error).splitlines()[0]}"
            ) from None
        needed = get_peft_model_state_dict(model, save_embedding_layers=False)
        known = get_peft_model_state_dict(model, save_embedding_layers=True)
    _check_names(subject, file, set(weights), set(needed), set(known))
    for name in sorted(weights):
        if weights[name].raw.shape != tuple(known[name].shape):
            raise ValueError(
                f"{file}: {name} is {shape(weights[name].raw.shape)}, {subject.base} needs"
                f" {shape(known[name].shape)}; it was trained on another base: name that with --base"
            )
    return str((base.architectures or [type(model).__name__])[0])


def _check_names(subject: Subject, file: Path, names: set[str], needed: set[str], known: set[str]) -> None:
    if missing := sorted(needed - names):
        raise ValueError(
            f"{file} lacks {missing[0]}{and_more(missing)}, which its {ADAPTER_CONFIG} and {subject.base}"
            " need"
        )
    if extra := sorted(name for name in (names - needed) & known if ".base_layer." not in name):
        raise ValueError(
            f"{file} has {extra[0]}{and_more(extra)} besides, a matrix of the base that peft would put in the"
            " place of the base's own; save the adapter without it (save_embedding_layers=False), or name it"
            " in modules_to_save"
        )
    if unknown := sorted(names - known):
        raise ValueError(f"{file} has {unknown[0]}{and_more(unknown)}, which {subject.base} has no place for")
