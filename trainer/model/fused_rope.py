"""Rotary position embeddings (RoPE) as one function for autograd, with fewer operations than transformers'
own."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

NAME, HALF = "apply_rotary_pos_emb", "rotate_half"
_LLAMAS = (modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half)  # before they may be replaced


def fuse_rope(model: Any) -> bool:
    """Have a model's attention rotate by our function; return whether it does. It takes the place of
    transformers' in the module that defines the attention, if that is known code, word for word; so all
    models of that module in this process use it."""
    homes = {
        sys.modules[type(module).__module__]
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    }
    known = [home for home in homes if getattr(home, NAME, None) is rotate or _is_known(home)]
    for home in known:
        setattr(home, NAME, rotate)
    return bool(known)


def _is_known(home: Any) -> bool:
    own = (getattr(home, NAME, None), getattr(home, HALF, None))
    return all(_code(one) == _code(llama) for one, llama in zip(own, _LLAMAS, strict=True))


def _code(function: Any) -> Any:
    code = getattr(function, "__code__", None)
    return code and (code.co_code, code.co_consts[1:], code.co_names)  # the first is the docstring


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys, [lines, heads, tokens, dim], turned by their places. cos, sin: [lines, tokens,
    dim]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q, k = (_Rotation.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]
    return q, k


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(_half_turned(x) * sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return (gradient * cos).sub_(_half_turned(gradient * sin)), None, None


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
