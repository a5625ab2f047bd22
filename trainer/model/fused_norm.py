"""RMSNorm as one function for autograd, whose output is made again where the backward pass needs it.

It keeps its input and a number a token. Layers that would keep its output ask `kept_for`, and keep what it is
made from instead, which is kept already.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# transformers' classes whose forward is weight * (x * rsqrt(mean(x^2) + variance_epsilon)), x in float32
CLASSES = (
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen2_5_VLRMSNorm",
    "Qwen3VLTextRMSNorm",
    "Qwen3VLMoeTextRMSNorm",
    "LlamaRMSNorm",
    "MistralRMSNorm",
)


class Kept(NamedTuple):
    """What an output is made from: the norm's input [..., hidden], 1 / root mean square [..., 1] in float32,
    and the norm's module, which has the weight. version: torch's, of the output as the norm made it."""

    x: Tensor
    inverse: Tensor
    norm: Any
    version: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What autograd is to keep."""
        return self.x, self.inverse


def fuse_norms(model: Any) -> int:
    """Make a model's norms one function each; return how many. Not for a base under ZeRO-3."""
    norms = [
        module
        for module in model.modules()
        if type(module).__name__ in CLASSES and not module.weight.requires_grad
    ]
    for norm in norms:
        norm.forward = MethodType(_forward, norm)
    return len(norms)


def kept_for(x: Tensor) -> Kept | None:
    """Return what to keep instead of a tensor, if it is a norm's output, unchanged."""
    kept: Kept | None = getattr(x, "_qwenlora_kept", None)
    return kept if kept and kept.version == x._version else None


def input_of(norm: Any, tensors: Any) -> Tensor:
    """Return a tensor again. norm: that made it, if any; tensors: what autograd kept, Kept's or itself."""
    again: Tensor = _normed(tensors[0], tensors[1], norm.weight) if norm is not None else tensors[0]
    return again


def _normed(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.float() * inverse).to(x.dtype)


def _forward(norm: Any, x: Tensor) -> Tensor:
    output: Tensor
    inverse: Tensor
    output, inverse = _Norm.apply(x, norm)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        output._qwenlora_kept = Kept(x.detach(), inverse, norm, output._version)  # type: ignore[attr-defined]
    return output


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        ctx.norm = norm
        ctx.save_for_backward(x, inverse)
        ctx.mark_non_differentiable(inverse)
        return _normed(x, inverse, norm.weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        x, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        weighted = (gradient * ctx.norm.weight).float()
        along = (weighted * normed).mean(-1, keepdim=True)
        return ((weighted - normed * along) * inverse).to(x.dtype), None
