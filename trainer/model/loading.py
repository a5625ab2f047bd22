"""The base model's weights, loaded as a whole. spread/sharded_loading.py loads a base of which each rank
holds a part."""

import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenlora.configs.schema import Config
from qwenlora.run.format import and_more, shape
from qwenlora.trainer.model import head
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.base import hub_errors
from qwenlora.trainer.model.nf4_loading import experts_too
from qwenlora.trainer.model.pretrained import quantised_files, read_config_of, unties

IGNORED = -100  # labels without a loss: torch.nn.CrossEntropyLoss, ignore_index


def pick_dtype(name: str) -> torch.dtype:
    """Return model.dtype as torch's. auto: bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def device() -> torch.device:
    """Return the device that this rank computes on."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def load_base(config: Config, base: str, number: int = 0, parts: int = 1) -> Any:
    """Return the base model in its dtype, or quantised as the config says, whole on this rank's device; of
    experts in nf4 one of so many parts. number: which."""
    dtype = pick_dtype(config.model.dtype)
    # straight to this rank's GPU, without a copy in host memory
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device_map = {"": local_rank} if torch.cuda.is_available() else None
    model_config = read_config_of(config, base)
    if own_head := unties(config, base, model_config, download=True):
        head.untie(model_config)
    with hub_errors("model.name_or_path", config.model.name_or_path), experts_too(number, parts):
        model, loading = class_of(model_config).from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            output_loading_info=True,
            device_map=device_map,
            ignore_mismatched_sizes=True,  # refuse_misfits names them
            **({"config": model_config} if own_head else {}),
            **_quantization(config, dtype),
        )
    refuse_misfits(config, loading)
    if config.strategy.quantization == "nf4" or quantised_files(model_config):
        _keep_4bit_weights_as_they_are(model)
    return model


def _quantization(config: Config, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """Return from_pretrained's argument for a quantised base; empty in full precision."""
    if config.strategy.quantization == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": nf4}
    if config.strategy.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {}


def refuse_misfits(config: Config, loading: dict[str, Any]) -> None:
    """Refuse a base whose files lack weights, or have them in other shapes: transformers would draw random
    ones at each start. loading: from_pretrained's loading info. Raises: ValueError naming the first."""
    for name, in_files, expected in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: {name} is {shape(in_files)} in its files, and"
            f" {shape(expected)} by its config.json: they are of different models; download both again"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: its files lack {missing[0]}{and_more(missing)},"
            " which would be random numbers; download it again, or name a base that is whole"
        )


def set_up(model: Any, recomputed: int = 0) -> None:
    """Prepare a base model for training, however it was loaded. recomputed: layers, from the first, that
    compute their activations again in the backward pass."""
    model.config.get_text_config().use_cache = False
    compute_again(model, recomputed)


def compute_again(model: Any, count: int) -> None:
    """Make so many layers of a base, from the first, compute their activations again in the backward pass:
    that reaches them last, when the others hold nothing any more."""
    if count:
        # the non-reentrant kind needs no input that requires gradients, and works with DDP
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count


def _keep_4bit_weights_as_they_are(model: torch.nn.Module) -> None:
    # on CPUs with AVX512_BF16, bitsandbytes repacks 4-bit weights in eval() and never back: training after an
    # evaluation would compute with the wrong layout
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a plain attribute, not a Tensor)
