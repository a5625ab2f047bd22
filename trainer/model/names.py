"""Names of a base's parameters, and of its adapter, where the base is in the layout of a vision model.

They are those of transformers' full class: `model.language_model.layers.0 ...`. peft on the full class reads
only these, and so does vLLM, which leaves out others without a word. transformers' text class for such a base
(Qwen3_5ForCausalLM) has names without language_model, and so have adapters that were trained over it.

Sources: transformers 5.23 (models/qwen3_5/modeling_qwen3_5.py, conversion_mapping.py); peft 0.21
(utils/save_and_load.py); vLLM (hf_to_vllm_mapper in model_executor/models/qwen3_vl.py, from which Qwen3.5's
class has it; activate_adapter in lora/model_manager.py, which resets modules that an adapter does not name).
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from qwenlora.plan.shape import WITH_VISION

VISION = "visual"  # the vision part, in names
# of the text class, and of transformers before 4.52: {pattern: today's}
OLDER_NAMES = {
    r"^model\.(?=(embed_tokens|layers|norm)\b)": "model.language_model.",
    rf"^{VISION}\.": f"model.{VISION}.",
}
WITHOUT_VISION = rf"(.*\.)?{VISION}\..*"  # peft's exclude_modules that leave the vision part alone
_PEFT_S = "base_model.model."

T = TypeVar("T")


def has_vision(model_config: Any) -> bool:
    """Whether a base is in the layout of a vision model. model_config: transformers'."""
    return model_config.model_type in WITH_VISION


def older_names(model: Any) -> dict[str, str]:
    """Return {pattern: today's name} for adapters of a model, as peft's key_mapping. model: transformers', or
    peft's over it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "_checkpoint_conversion_mapping", {})


def names_in(model: Any, named: Mapping[str, T]) -> dict[str, T]:
    """Return tensors or settings of an adapter under the names that a model has. model: as in older_names."""
    return todays(named, older_names(model))


def todays(named: Mapping[str, T], older: Mapping[str, str] = OLDER_NAMES) -> dict[str, T]:
    """Return tensors or settings of an adapter under today's names. older: {pattern: today's name}."""
    return {_renamed(name, older): value for name, value in named.items()}


def _renamed(name: str, older: Mapping[str, str]) -> str:
    inner = name.removeprefix(_PEFT_S)
    outer = name[: len(name) - len(inner)]
    for pattern, today in older.items():
        inner = re.sub(pattern, today, inner)
    return outer + inner
