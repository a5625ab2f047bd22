"""Attention of rows that lie end to end, on a GPU: torch's varlen_attn, which takes all rows in one call and
needs neither a mask nor another package."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

LENGTHS = [3, 130, 1, 61]  # of the rows that are tried; a kernel's blocks have 64 or 128 tokens
APART = 0.02  # of the exact result's norm: bfloat16 rounds by 0.004


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], scale: float | None
) -> Tensor:
    """Return causal attention of rows, [lines, tokens, heads, dim].

    query: [lines, heads, tokens, dim], float16 or bfloat16; key, value: the same, with as many heads or a
    divisor of them; lengths: of each line's rows, which together fill it. scale: None for 1 / sqrt(dim).
    """
    lines, _, tokens, _ = query.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    every = tuple(length for line in lengths for length in line)
    ends, longest = _ends(every, query.device), max(every)
    output: Any = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
    )
    result: Tensor = output.unflatten(0, (lines, tokens))
    return result


@functools.lru_cache(maxsize=2)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where rows end, int32 [rows + 1], on the device: copied once for all layers of a micro-batch."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def works(heads: int, key_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch, GPU and shape have the kernel, forward and backward: it is tried on a few rows, and
    compared with each row by itself in float32."""
    random = torch.Generator().manual_seed(0)
    shapes = [(1, number, sum(LENGTHS), dim) for number in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
    mine = [tensor.clone().requires_grad_() for tensor in drawn[:3]]
    exact = [tensor.float().requires_grad_() for tensor in drawn[:3]]
    slope = drawn[3].transpose(1, 2)
    try:
        output = attend(mine[0], mine[1], mine[2], [LENGTHS], None)
        output.backward(slope)  # type: ignore[no-untyped-call]
    except (RuntimeError, TypeError, ValueError):  # there is no such kernel, or it takes other arguments
        return False
    rows = list(zip(*(torch.split(tensor, LENGTHS, 2) for tensor in exact), strict=True))
    parts = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in rows]
    expected = torch.cat(parts, 2).transpose(1, 2)
    expected.backward(slope.float())  # type: ignore[no-untyped-call]
    pairs = [(output, expected), *((one.grad, other.grad) for one, other in zip(mine, exact, strict=True))]
    return all(_are_alike(one, other) for one, other in pairs)


def _are_alike(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None
    assert other is not None
    return bool((one.float() - other).norm() <= APART * other.norm())  # not for NaN
