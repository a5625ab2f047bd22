"""Experts of a mixture in nf4, in bitsandbytes' format and by its functions, and computed a few at a time.

bitsandbytes quantises linear layers, and a mixture's experts are none. Here a layer's matrices of experts are
quantised as it quantises a layer's weight: one parameter of bytes, under the name that it has. Each expert's
matrix begins with a block of its own, so it is dequantised alone, to the numbers that it has in the whole.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**27  # bytes of matrices that are there dequantised


class Part(NamedTuple):
    """Dequantised matrices of some experts, [experts, out, in]; first, last: of the rows that are theirs,
    which follow one another; ends: [experts], where each expert's end, from first on."""

    matrices: Tensor
    first: int
    last: int
    ends: Tensor


def is_quantised(weight: Any) -> bool:
    """Whether a parameter of experts holds bytes."""
    return getattr(weight, "quant_state", None) is not None


def shape_of(weight: Any) -> torch.Size:
    """Return [experts, out, in] of experts' matrices, quantised or not."""
    shape: torch.Size = weight.quant_state.shape if is_quantised(weight) else weight.shape
    return shape


def dtype_of(weight: Any) -> torch.dtype:
    """Return the dtype that experts' matrices are computed in."""
    dtype: torch.dtype = weight.quant_state.dtype if is_quantised(weight) else weight.dtype
    return dtype


def quantise(weight: Tensor) -> Any:
    """Return experts' matrices, [experts, out, in], as a parameter of bytes, in nf4 with double quantisation:
    what bitsandbytes makes of the whole. Each expert is done alone: on a CPU that takes 20 bytes a number.

    Source: bitsandbytes.functional.quantize_4bit, with compress_statistics.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    bits, states = zip(*(quantize_4bit(one, quant_type="nf4") for one in weight), strict=True)
    absmax = torch.cat([state.absmax for state in states])
    offset = absmax.mean()
    scales, of_scales = quantize_blockwise(absmax - offset, blocksize=256)
    state = QuantState(
        scales,
        shape=weight.shape,
        code=states[0].code,
        blocksize=states[0].blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=offset,
        state2=of_scales,
    )
    quantised = Params4bit(torch.cat(bits), quant_state=state, quant_type="nf4", bnb_quantized=True)
    quantised.ds_shape = weight.shape  # where peft looks for a weight's shape first, as ZeRO-3 has it
    return quantised


def part_of(quantised: Any, first: int, last: int) -> Any:
    """Return the experts from first up to last of what quantise() made, of the same numbers. Their scales are
    float32: those of quantise() were quantised together with the others'. ds_shape is still that of all."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    state = quantised.quant_state
    experts, *of_one = state.shape
    some = QuantState(
        _scales(state).view(experts, -1)[first:last].flatten(),
        shape=torch.Size((last - first, *of_one)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    stored = quantised.data.view(experts, -1)[first:last].reshape(-1, 1).clone()
    part = Params4bit(stored, quant_state=some, quant_type="nf4", bnb_quantized=True)
    part.ds_shape = state.shape
    return part


def _scales(state: Any) -> Tensor:
    """Return the scale of each block."""
    from bitsandbytes.functional import dequantize_blockwise

    scales: Tensor = state.absmax
    return dequantize_blockwise(scales, state.state2) + state.offset if state.nested else scales


def parts(weight: Any, ends: Sequence[int]) -> Iterator[Part]:
    """Yield the matrices of experts that have rows, AT_ONCE bytes of them at a time. ends: of each expert's
    rows, one expert's after the other's."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = weight.quant_state
    experts, *of_one = state.shape
    blocks = _scales(state).view(experts, -1)
    stored = weight.data.view(experts, -1)
    begins = (0, *ends[:-1])
    used = [number for number in range(experts) if ends[number] > begins[number]]
    together = max(AT_ONCE // (of_one[0] * of_one[1] * state.dtype.itemsize), 1)
    for some in (used[at : at + together] for at in range(0, len(used), together)):
        absmax = blocks[some].view(-1)
        some_state = QuantState(
            absmax,
            # a block a row: bitsandbytes' kernel for CPUs misreads blocks that go over the end of a row
            shape=torch.Size([len(absmax), state.blocksize]),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        first = begins[some[0]]
        yield Part(
            dequantize_4bit(stored[some].view(-1, 1), some_state).view(len(some), *of_one),
            first,
            ends[some[-1]],
            torch.tensor([ends[number] - first for number in some], dtype=torch.int32, device=weight.device),
        )
