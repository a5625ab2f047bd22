"""A LoRA adapter for a first-generation Qwen as one for Qwen2's architecture, exactly.

c_attn is cut in three, and so is its lora_B, by rows; lora_A is the same for q, k and v. DoRA's magnitudes
belong to rows, too. The base has to be converted as well: an adapter alone does not say how many layers there
are.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from qwenlora.adapter.qwen1.weights import modules_of
from qwenlora.adapter.subject import CONFIG, adapter_config
from qwenlora.adapter.verify import read

PREFIX = "base_model.model."
# keys that change what the adapter's tensors are, or which modules they are of
UNKNOWN = (
    "enable_lora",
    "bias",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
)
# peft takes all modules whose names end so: norm alone would be input_layernorm, too
SAVED = {
    "wte": "embed_tokens",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_f": "model.norm",
}
_NUMBER = re.compile(r"(^|\.)\d+\.")  # of a layer


def convert(source: Path, folder: Path) -> str:
    """Write an adapter into a folder that is there; return the base that it named, which the new one does
    not.

    Raises: ValueError when it is no LoRA for a Qwen-1, or has what cannot be carried over.
    """
    said = adapter_config(source)
    for key in UNKNOWN:
        if said.get(key) and (key, said[key]) != ("bias", "none"):
            raise ValueError(
                f"{source / CONFIG} has {key}={said[key]}, which convert-qwen1 cannot carry over"
            )
    file, weights = read(source)
    converted = _converted(file, weights)
    config: Any = PeftConfig.from_pretrained(str(source))  # which fills in what its peft did not know yet
    config.target_modules = _targets(said, converted)
    config.modules_to_save = _saved(source, said)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None  # names say it
    config.fan_in_fan_out = False
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    save_file(converted, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return str(said.get("base_model_name_or_path") or "not named in it")


def _converted(file: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under their new names."""
    converted = {}
    for name, values in weights.items():
        modules, kind = modules_of(name.removeprefix(PREFIX))
        if not modules:
            if ".layers." in name:
                raise ValueError(f"{file} has {name}: it is not for a Qwen-1, and needs no conversion")
            raise ValueError(f"{file} has {name}, which a Qwen-1 has no place for")
        if values.ndim == 0 or (len(values) % len(modules) and not kind.startswith("lora_A")):
            raise ValueError(
                f"{file}: {name} is of shape {list(values.shape)}, expected as many rows for q as for k and v"
            )
        shares = [values] * len(modules) if kind.startswith("lora_A") else values.chunk(len(modules))
        for module, share in zip(modules, shares, strict=True):
            converted[f"{PREFIX}{module}.{kind}"] = share.clone(memory_format=torch.contiguous_format)
    return converted


def _targets(said: dict[str, Any], converted: dict[str, Tensor]) -> list[str]:
    """Return the modules with LoRA: by their last names where all layers have them, else in full."""
    modules = sorted(
        {name.removeprefix(PREFIX).partition(".lora_")[0] for name in converted if ".lora_" in name}
    )
    given = said.get("target_modules")
    narrowed = said.get("layers_to_transform") is not None or said.get("exclude_modules")
    if isinstance(given, list) and not narrowed and not any(_NUMBER.search(name) for name in given):
        return sorted({module.rpartition(".")[2] for module in modules})
    return modules


def _saved(source: Path, said: dict[str, Any]) -> list[str] | None:
    """Return the modules that were trained whole, by their new names."""
    given = said.get("modules_to_save") or []
    for name in given:
        if name.rpartition(".")[2] not in SAVED:
            raise ValueError(
                f"{source / CONFIG} has modules_to_save={name}, which convert-qwen1 cannot carry over"
            )
    return [SAVED[name.rpartition(".")[2]] for name in given] or None
