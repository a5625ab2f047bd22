"""Has transformers quantise a mixture's experts to nf4 while it reads them, one parameter after the other,
and compute them by fused_experts.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.fused_experts import DOWN, UP, has_grouped_mm, is_even, is_known, without_lora
from qwenlora.trainer.model.kinds import stacks
from qwenlora.trainer.model.nf4_experts import shape_of

IN_4_BITS = "bitsandbytes_4bit"  # in transformers' table of quantisers
NF4 = "nf4"  # our name in its table of ways to compute experts


def check(config: Config, model: nn.Module) -> None:
    """Refuse nf4 for experts that cannot be computed from it. model: the base, on any device. Raises:
    ValueError."""
    if config.strategy.quantization != NF4:
        return
    named = f"strategy.quantization=nf4: the experts of model.name_or_path={config.model.name_or_path}"
    cure = "set strategy.quantization: none"
    known = {f"{name}.{weight}" for name, _ in _mixtures(model) for weight in (UP, DOWN)}
    if unknown := [name for name in stacks(model) if name not in known]:
        raise ValueError(f"{named} ({unknown[0]} ...) are not as a Qwen's, and only those run in nf4; {cure}")
    if known and torch.cuda.is_available() and not has_grouped_mm(torch.device("cuda")):
        raise ValueError(
            f"{named} need a GPU of compute capability 8.0 or more, which multiplies rows in groups; {cure}"
        )


@contextmanager
def experts_too() -> Iterator[None]:
    """Within, transformers quantises experts with the linear layers of a base in 4 bits."""
    theirs = AUTO_QUANTIZER_MAPPING[IN_4_BITS]
    AUTO_QUANTIZER_MAPPING[IN_4_BITS] = Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[IN_4_BITS] = theirs


class Quantizer(Bnb4BitHfQuantizer):
    """transformers' for bitsandbytes' 4 bits, which loads experts as the weights of linear layers."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        from bitsandbytes.nn import Params4bit

        super()._process_model_before_weight_loading(model, device_map, **options)
        for _, experts in [] if self.pre_quantized else _mixtures(model):
            for name in (UP, DOWN):
                empty = getattr(experts, name)
                setattr(experts, name, Params4bit(empty.data, requires_grad=False, quant_type=NF4))
            experts.source_cls = type(experts)  # which transformers asks whether to transpose

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        from bitsandbytes.nn import Params4bit

        is_linear: bool = super().param_needs_quantization(model, param_name, **options)
        return is_linear or isinstance(model.get_parameter_or_buffer(param_name), Params4bit)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        ALL_EXPERTS_FUNCTIONS.register(NF4, without_lora)
        for _, experts in [] if self.pre_quantized else _mixtures(model):
            experts.config._experts_implementation = NF4
            for name in (UP, DOWN):
                weight = getattr(experts, name)
                weight.ds_shape = (
                    weight.quant_state.shape
                )  # where peft looks for a weight's, as ZeRO-3 has it
        return super()._process_model_after_weight_loading(model, **options)


def _mixtures(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, module) of the experts that can be computed in nf4."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, weight, None), nn.Parameter) for weight in (UP, DOWN))
        and is_known(module)
        and all(is_even(shape_of(getattr(module, weight))) for weight in (UP, DOWN))
    ]
