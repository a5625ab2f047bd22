"""Attention over rows that lie end to end in one sequence: each row by itself, so that nothing is padded and
no mask is made. On a CPU one row after the other, on a GPU all in one call (varlen.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenlora.trainer.model import varlen
from qwenlora.trainer.model.loading import device
from qwenlora.trainer.model.pretrained import layer_kinds

# its name in transformers, which treats names with "flash" or "sdpa" in them specially, and makes no mask for
# others
NAME = "qwenlora_rows"
LINEAR = "linear_attention"  # layers of which row_states.py keeps rows apart


def attend_row_by_row(model: Any, *, states_apart: bool = False) -> bool:
    """Make a model attend row by row, where that is possible; return whether it is. Its batches must then say
    by position_ids where rows begin; padding is on the right, and no attention_mask is looked at.
    states_apart: whether the states of its linear attention are kept apart."""
    possible = (
        model.config._attn_implementation == "sdpa"
        and layer_kinds(model.config) <= {"full_attention"} | ({LINEAR} if states_apart else set())
        and not getattr(model.config.get_text_config(), "attention_dropout", 0.0)
        # models with linear attention pass position_ids on to their attention, too, but do not say so
        and (states_apart or bool(getattr(model, "_supports_attention_backend", False)))
        and _has_kernel(model)
    )
    if possible:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        model.config._attn_implementation = NAME
    return possible


def _has_kernel(model: Any) -> bool:
    """Whether this machine has a kernel for rows: a CPU always, a GPU by a trial."""
    here, text = device(), model.config.get_text_config()
    if here.type == "cpu":
        return True
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return varlen.works(heads, text.num_key_value_heads, dim, model.dtype, here)


def attend_to_padded_rows(model: Any) -> None:
    """Undo attend_row_by_row."""
    model.config._attn_implementation = "sdpa"


def takes_rows_end_to_end(model: Any) -> bool:
    """Whether a model attends row by row."""
    return bool(model.config._attn_implementation == NAME)


def described(model: Any) -> str:
    """Return how a model attends to the rows of a sequence, for the start-up table."""
    if not takes_rows_end_to_end(model):
        return str(model.config._attn_implementation)
    how = "all rows in one call (torch's varlen_attn)" if device().type == "cuda" else "each row by itself"
    return f"{how}, no padding, no mask"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention, [lines, tokens, heads, dim]. query, key, value: [lines, heads, tokens, dim];
    position_ids, an option: [lines, tokens], from 0 in each row of a line."""
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    positions = options.pop("position_ids", None)
    if positions is None:
        return attend(module, query, key, value, None, **options)[0], None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # it does not know the kernel that is called here
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    lengths = lengths_of(positions) * (len(query) // len(positions))
    return KERNELS[kind](query, key, value, lengths, options.get("scaling")), None


def _in_turn(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], scale: float | None
) -> Tensor:
    """Do what varlen.attend() does, on a CPU."""
    lines = [(query, key, value)]
    if len(query) > 1:
        lines = list(zip(*(torch.split(tensor, 1) for tensor in lines[0]), strict=True))
    outputs = [
        _Rows.apply(*line, own, scale)  # type: ignore[no-untyped-call]
        for line, own in zip(lines, lengths, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


# by the kind of device; each is given query, key and value, [lines, heads, tokens, dim], the lengths of each
# line's rows, and the scale
KERNELS: dict[str, Callable[..., Tensor]] = {"cpu": _in_turn, "cuda": varlen.attend}


class _Rows(torch.autograd.Function):
    """Causal attention of the rows of a line, by torch's flash kernel for CPUs; heads may share keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
    ) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        rows = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), strict=True)
        outputs, sums = zip(*(attend(*row, 0.0, True, scale=scale) for row in rows), strict=True)
        output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(query, key, value, output, *sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, *sums = ctx.saved_tensors
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        whole = (gradient.transpose(1, 2), query, key, value, output.transpose(1, 2))
        rows = zip(*(torch.split(tensor, ctx.lengths, 2) for tensor in whole), sums, strict=True)
        parts = [attend(*row, 0.0, True, scale=ctx.scale) for row in rows]
        return (*(torch.cat(of_one, 2) for of_one in zip(*parts, strict=True)), None, None)


def lengths_of(positions: Tensor) -> list[list[int]]:
    """Return the lengths of the rows of each line, which all layers of a step ask for."""
    known: list[list[int]] | None = getattr(positions, "_qwenlora_lengths", None)
    if known is None:
        known = [_of_line(line) for line in positions]
        positions._qwenlora_lengths = known  # type: ignore[attr-defined]
    return known


def _of_line(positions: Tensor) -> list[int]:
    if isinstance(positions, FakeTensor):  # it has no numbers, and is traced as one row
        return [len(positions)]
    starts: list[int] = (positions == 0).nonzero().squeeze(1).tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
