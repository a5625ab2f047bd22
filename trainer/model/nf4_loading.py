"""Has transformers quantise a mixture's experts to nf4 while it reads them, one parameter after the other,
and compute them by fused_experts.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.fused_experts import (
    DOWN,
    UP,
    is_mixture,
    mixtures,
    refuse_unknown,
    without_lora,
)
from qwenlora.trainer.model.nf4_experts import is_quantised, part_of, quantise

IN_4_BITS = "bitsandbytes_4bit"  # in transformers' table of quantisers
NF4 = "nf4"  # our name in its table of ways to compute experts


def check(config: Config, model: nn.Module) -> None:
    """Refuse nf4 for experts that cannot be computed from it. model: the base, on any device. Raises:
    ValueError."""
    if config.strategy.quantization == NF4:
        setting = f"strategy.quantization=nf4 with model.name_or_path={config.model.name_or_path}"
        refuse_unknown(model, setting, "set strategy.quantization: none")


@contextmanager
def experts_too(number: int = 0, parts: int = 1) -> Iterator[None]:
    """Within, transformers quantises experts with the linear layers of a base in 4 bits, and keeps one of so
    many parts of them. number: which."""
    theirs = AUTO_QUANTIZER_MAPPING[IN_4_BITS]
    AUTO_QUANTIZER_MAPPING[IN_4_BITS] = type("Quantizer", (Quantizer,), {"number": number, "parts": parts})
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[IN_4_BITS] = theirs


class Quantizer(Bnb4BitHfQuantizer):
    """transformers' for bitsandbytes' 4 bits, which quantises experts, too. number, parts: as in
    experts_too."""

    number, parts = 0, 1

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        of_linear: bool = super().param_needs_quantization(model, param_name, **options)
        owner, _, name = param_name.rpartition(".")
        return of_linear or (name in (UP, DOWN) and is_mixture(model.get_submodule(owner)))

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(super().get_quantize_ops(), self.number, self.parts)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        ALL_EXPERTS_FUNCTIONS.register(NF4, without_lora)
        for _, experts in mixtures(model):
            if is_quantised(getattr(experts, UP)):
                experts.config._experts_implementation = NF4
        return super()._process_model_after_weight_loading(model, **options)


class _Quantise(ConversionOps):
    """Quantises a parameter that was read. theirs: what quantises a linear layer's; number, parts: as
    in experts_too."""

    def __init__(self, theirs: Any, number: int, parts: int) -> None:
        self.theirs, self.number, self.parts = theirs, number, parts

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: Any = None, model: Any = None, **options: Any
    ) -> dict[str, Any]:
        quantised: dict[str, Any] = {}
        for name, value in input_dict.items():
            if name.endswith((UP, DOWN)):
                values = value[0] if isinstance(value, list) else value
                first, last = (len(values) // self.parts * place for place in (self.number, self.number + 1))
                whole = quantise(values)
                quantised[name] = part_of(whole, first, last) if self.parts > 1 else whole
            else:
                quantised |= self.theirs.convert({name: value}, full_layer_name, model, **options)
        return quantised
