"""Which of a model's parts compute by functions of our own, instead of transformers' and peft's."""

from dataclasses import dataclass
from typing import Any

from qwenlora.trainer.model.fused_experts import fuse_experts
from qwenlora.trainer.model.fused_lora import fuse_lora
from qwenlora.trainer.model.fused_norm import fuse_norms
from qwenlora.trainer.model.fused_rope import fuse_rope
from qwenlora.trainer.model.fused_tokens import fuse_tokens


@dataclass(frozen=True)
class Fused:
    """What was fused. layers: linear layers with LoRA; experts: mixtures with LoRA on their experts; plain,
    plain_experts: those that keep peft's way; mlps, norms: whole ones; rope: whether rotary embeddings
    were; tokens: embeddings and heads of which rows are trained."""

    layers: int = 0
    plain: int = 0
    mlps: int = 0
    norms: int = 0
    rope: bool = False
    experts: int = 0
    plain_experts: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        """What the start-up table says, as `LoRA, experts, MLPs, norms and RoPE`."""
        names = {
            "LoRA": self.layers,
            "experts": self.experts,
            "MLPs": self.mlps,
            "norms": self.norms,
            "RoPE": self.rope,
            "tokens": self.tokens,
        }
        *fused, last = [name for name, number in names.items() if number] or ["nothing"]
        left = (
            f"; {self.plain} of {self.plain + self.layers} layers with LoRA as in peft" if self.plain else ""
        )
        if self.plain_experts:
            left += f"; experts of {self.plain_experts} layers as in peft, which copies them in each step"
        return f"{', '.join(fused)} and {last}{left}" if fused else last + left


def fuse(model: Any, *, sharded_by_deepspeed: bool = False) -> Fused:
    """Fuse what can be fused in a peft model; it computes the same, to rounding. sharded_by_deepspeed: the
    base is under ZeRO-3, whose weights are there only while their module runs: norms and layers are left."""
    rope, tokens = fuse_rope(model), fuse_tokens(model)
    experts, plain_experts = fuse_experts(model)
    if sharded_by_deepspeed:
        return Fused(rope=rope, tokens=tokens, experts=experts, plain_experts=plain_experts)
    norms = fuse_norms(model)
    layers, mlps, plain = fuse_lora(model)
    return Fused(layers, plain, mlps, norms, rope, experts, plain_experts, tokens)
