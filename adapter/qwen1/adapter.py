"""A LoRA adapter for a first-generation Qwen, converted exactly to one for the converted base.

c_attn is cut in three by rows, and so are its lora_B and DoRA's magnitudes; q, k and v share its lora_A.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from qwenlora.adapter.adapter_file import read_adapter
from qwenlora.adapter.qwen1.weights import modules_of
from qwenlora.adapter.subject import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from qwenlora.adapter.tensors import tensor_of

PREFIX = "base_model.model."
# keys that change the meaning of the adapter's tensors, or which modules they belong to
NOT_CONVERTED = (
    "enable_lora",
    "bias",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
)
# peft takes all modules whose names end with these: norm alone would match input_layernorm, too
SAVED_MODULES = {
    "wte": "embed_tokens",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_f": "model.norm",
}
_NUMBER = re.compile(r"(^|\.)\d+\.")  # of a layer


def convert_adapter(source: Path, folder: Path) -> str:
    """Write the converted adapter, which names no base, into folder; return the base that source names.

    Raises: ValueError when source is no LoRA for a Qwen-1, or has settings that cannot be converted.
    """
    old = read_adapter_config(source)
    for key in NOT_CONVERTED:
        if old.get(key) and (key, old[key]) != ("bias", "none"):
            raise ValueError(
                f"{source / ADAPTER_CONFIG} has {key}={old[key]}, which convert-qwen1 cannot carry over"
            )
    file, held = read_adapter(source)
    converted = _converted(file, {name: tensor_of(values) for name, values in held.items()})
    config: Any = PeftConfig.from_pretrained(str(source))  # adds the keys of newer versions of peft
    config.target_modules = _target_modules(old, converted)
    config.modules_to_save = _modules_to_save(source, old)
    # target_modules names the modules in full
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.fan_in_fan_out = False
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    save_file(converted, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return str(old.get("base_model_name_or_path") or "not named in it")


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


def _target_modules(old: AdapterConfig, converted: dict[str, Tensor]) -> list[str]:
    """Return the modules with LoRA by their last names if all layers have them, else by their full names."""
    modules = sorted(
        {name.removeprefix(PREFIX).partition(".lora_")[0] for name in converted if ".lora_" in name}
    )
    given = old.get("target_modules")
    narrowed = old.get("layers_to_transform") is not None or old.get("exclude_modules")
    if isinstance(given, list) and not narrowed and not any(_NUMBER.search(name) for name in given):
        return sorted({module.rpartition(".")[2] for module in modules})
    return modules


def _modules_to_save(source: Path, old: AdapterConfig) -> list[str] | None:
    """Return the modules that were trained whole, by their new names."""
    given = old.get("modules_to_save") or []
    for name in given:
        if name.rpartition(".")[2] not in SAVED_MODULES:
            raise ValueError(
                f"{source / ADAPTER_CONFIG} has modules_to_save={name}, which convert-qwen1 cannot carry over"
            )
    return [SAVED_MODULES[name.rpartition(".")[2]] for name in given] or None
