"""Attention over rows that lie end to end in one sequence: each row by itself, so that nothing is padded and
no mask is made. It is for CPUs; GPUs have kernels for many rows at once."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenlora.trainer.model.loading import device
from qwenlora.trainer.model.pretrained import layer_kinds

# its name in transformers, which treats names with "flash" or "sdpa" in them specially, and makes no mask for
# others
NAME = "qwenlora_rows"


def attend_row_by_row(model: Any) -> bool:
    """Make a model attend row by row, where that is possible; return whether it is. Its batches must then say
    by position_ids where rows begin; padding is on the right, and no attention_mask is looked at."""
    possible = (
        device().type == "cpu"
        and model.config._attn_implementation == "sdpa"
        and layer_kinds(model.config) == {"full_attention"}
        and bool(getattr(model, "_supports_attention_backend", False))
    )
    if possible:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        model.config._attn_implementation = NAME
    return possible


def attend_to_padded_rows(model: Any) -> None:
    """Undo attend_row_by_row."""
    model.config._attn_implementation = "sdpa"


def takes_rows_end_to_end(model: Any) -> bool:
    """Whether a model attends row by row."""
    return bool(model.config._attn_implementation == NAME)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention, [lines, tokens, heads, dim]. query, key, value: [lines, heads, tokens, dim];
    position_ids, an option: [lines, tokens], from 0 in each row of a line."""
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    positions = options.pop("position_ids", None)
    if positions is None:
        return attend(module, query, key, value, None, **options)[0], None
    lines = []
    for number, line in enumerate(positions.expand(len(query), -1)):
        lengths = _lengths(line)
        own = (torch.split(tensor[number : number + 1], lengths, 2) for tensor in (query, key, value))
        rows = [attend(module, *row, None, **options)[0] for row in zip(*own, strict=True)]
        lines.append(torch.cat(rows, 1))
    return torch.cat(lines), None


def _lengths(positions: Tensor) -> list[int]:
    starts: list[int] = (positions == 0).nonzero().squeeze(1).tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
