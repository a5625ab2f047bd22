"""Gated delta nets over rows that lie end to end: their convolution and their state begin anew in each row.

transformers' functions know rows by seq_idx and cu_seqlens, but only with the kernels of causal-conv1d and
flash-linear-attention. For its functions of plain torch, rows are laid out so that none sees another.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.import_utils import (
    is_causal_conv1d_available,
    is_flash_linear_attention_available,
)

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.pretrained import layer_kinds
from qwenlora.trainer.model.row_attention import LINEAR, lengths_of

NETS = "linear_attn"  # a decoder layer's gated delta net, in all of transformers' models that have them
CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"  # its functions, for many tokens
# kinds of layers, as transformers names them: that carry something from token to token, and that can be by
# the side of linear attention here
STATEFUL = {LINEAR, "conv", "hybrid", "hybrid_sliding"}
APART = {LINEAR, "full_attention", "sliding_attention"}
ROWS = "qwenlora_rows"  # the option that tells both functions of rows
CHUNK = 64  # tokens that the rule takes at once


class Padded(NamedTuple):
    """Rows of similar lengths as a padded batch, [rows, width] tokens. slots: where their tokens are among
    those of all rows; places: where in the batch, when it is flat."""

    rows: int
    width: int
    slots: Tensor
    places: Tensor


class EndToEnd(NamedTuple):
    """Where rows are in a micro-batch, its lines one after the other. numbers: of each token's row, int32;
    ends: where rows end, from 0 on, int32; batches: of all rows; order: puts the batches' tokens, one batch
    after the other, back into place."""

    numbers: Tensor
    ends: Tensor
    batches: tuple[Padded, ...]
    order: Tensor


def check(config: Config, model_config: Any) -> None:
    """Refuse to pack rows of a model whose states cannot be kept apart. model_config: transformers'. Raises:
    ValueError."""
    kinds = layer_kinds(model_config)
    if not kinds & STATEFUL or (kinds <= APART and _has_functions(_home_of(model_config))):
        return
    raise ValueError(
        f"model.name_or_path={config.model.name_or_path} has layers of {' and '.join(sorted(kinds))}, which"
        " carry a state from one packed row into the next, and which qwenlora cannot keep apart; set"
        " data.packing: off"
    )


def notes_on(model_config: Any) -> list[str]:
    """Return what the user is told of kernels that are missing on this machine's GPU."""
    if not torch.cuda.is_available() or LINEAR not in layer_kinds(model_config):
        return []
    available = {
        "flash-linear-attention": is_flash_linear_attention_available(),
        "causal-conv1d": is_causal_conv1d_available(),
    }
    missing = [name for name, there in available.items() if not there]
    lacks, line = " and ".join(missing), " ".join(missing)
    note = f"linear attention is slow without {lacks}, with the same numbers: pip install {line}"
    return [note] if missing else []


def keep_states_apart(model: Any) -> bool:
    """Have a model's gated delta nets begin anew where position_ids are 0, unless there is an attention_mask;
    return whether it has any that can. transformers' functions are replaced for all models of their module in
    this process; without rows they compute as ever."""
    layers = [layer for layer in model.modules() if hasattr(layer, NETS)]
    homes = {sys.modules[type(getattr(layer, NETS)).__module__] for layer in layers}
    if not homes or not all(map(_has_functions, homes)):
        return False
    for home in homes:
        for name, kept_apart, kernel in (
            (CONVOLUTION, _convolution, is_causal_conv1d_available()),
            (RULE, _rule, is_flash_linear_attention_available()),
        ):
            if not hasattr(own := getattr(home, name), ROWS):
                function = kept_apart(own, kernel=kernel)
                setattr(function, ROWS, True)
                setattr(home, name, function)
    for layer in layers:
        layer.register_forward_pre_hook(_tell_rows, with_kwargs=True)
    return True


def _home_of(model_config: Any) -> Any:
    """Return the module of a config's model; None when it is not one of transformers'."""
    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    return made and import_module(made.__module__)


def _has_functions(home: Any) -> bool:
    return hasattr(home, CONVOLUTION) and hasattr(home, RULE)


def _tell_rows(layer: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    positions = options.get("position_ids")
    if positions is None or any(
        options.get(name) is not None for name in ("attention_mask", "past_key_values")
    ):
        return None
    rows = _rows_of(positions)
    return (inputs, options | {ROWS: rows}) if rows else None


def _rows_of(positions: Tensor) -> EndToEnd | None:
    """Return the rows of a micro-batch, which all layers of a step ask for; None where each line is one."""
    lengths = [length for line in lengths_of(positions) for length in line]
    if len(lengths) == len(positions):
        return None
    known: EndToEnd | None = getattr(positions, "_qwenlora_rows", None)
    if known is None:
        known = make_rows(lengths, positions.device)
        positions._qwenlora_rows = known  # type: ignore[attr-defined]
    return known


def make_rows(row_lengths: list[int], device: torch.device) -> EndToEnd:
    """Return rows that lie end to end, by their lengths in tokens. A batch's longest row is less than twice
    as long as its shortest."""
    lengths = torch.tensor(row_lengths)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    numbers = torch.repeat_interleave(lengths)
    inside = torch.arange(len(numbers)) - ends[numbers]
    sizes = torch.tensor([(length - 1).bit_length() for length in row_lengths])
    batches = []
    for size in sorted(set(sizes.tolist())):
        chosen = sizes == size
        width = int(lengths[chosen].max())
        slots = chosen[numbers].nonzero().squeeze(1)
        places = (chosen.cumsum(0) - 1)[numbers[slots]] * width + inside[slots]
        batches.append(Padded(int(chosen.sum()), width, slots.to(device), places.to(device)))
    order = torch.cat([batch.slots for batch in batches]).argsort()
    return EndToEnd(numbers.int().to(device), ends.int().to(device), tuple(batches), order)


def _convolution(own: Callable[..., Tensor], *, kernel: bool) -> Callable[..., Tensor]:
    """Return a causal convolution that keeps rows apart. own: transformers'; kernel: whether it is
    causal-conv1d's, which takes seq_idx."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """x: [lines, channels, tokens]; weight: [channels, width]."""
        rows: EndToEnd | None = options.pop(ROWS, None)
        if rows is None:
            return own(x, weight, bias, **options)
        tokens = x.transpose(1, 2).flatten(0, 1)
        if kernel:
            made = own(tokens.t().unsqueeze(0), weight, bias, seq_idx=rows.numbers.unsqueeze(0), **options)
            made = made[0].t()
        else:  # as many zeros before each row as before the first one
            gap = weight.shape[-1] - 1
            places = torch.arange(len(tokens), device=x.device) + gap * rows.numbers
            spaced = tokens.new_zeros(len(tokens) + gap * (len(rows.ends) - 2), tokens.shape[1])
            spaced = spaced.index_copy(0, places, tokens)
            made = own(spaced.t().unsqueeze(0), weight, bias, **options)[0].t().index_select(0, places)
        return made.reshape(len(x), -1, x.shape[1]).transpose(1, 2)

    return convolve


def _rule(own: Callable[..., Any], *, kernel: bool) -> Callable[..., Any]:
    """Return a gated delta rule that keeps rows apart. own: transformers'; kernel: whether it is
    flash-linear-attention's, which takes cu_seqlens."""

    def apply(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        """query, key, value: [lines, tokens, heads, dim]; g, beta: [lines, tokens, heads]."""
        rows: EndToEnd | None = options.pop(ROWS, None)
        if rows is None:
            return own(query, key, value, g=g, beta=beta, **options)
        lines = len(query)
        tokens = [tensor.flatten(0, 1) for tensor in (query, key, value, g, beta)]
        if kernel:
            options["cu_seqlens"] = rows.ends
            made = _called(own, [tensor.unsqueeze(0) for tensor in tokens], options)[0]
        else:
            parts = [_of_batch(own, batch, tokens, options) for batch in rows.batches]
            made = torch.cat(parts).index_select(0, rows.order)
        return made.reshape(lines, -1, *made.shape[1:]), None

    return apply


def _of_batch(own: Any, batch: Padded, tokens: list[Tensor], options: dict[str, Any]) -> Tensor:
    """Return what the rule makes of a batch's tokens. Padding is on the right, where no token of a row looks;
    with zeros in it, it changes no state either."""
    padded = [
        tensor.new_zeros(batch.rows * batch.width, *tensor.shape[1:])
        .index_copy(0, batch.places, tensor.index_select(0, batch.slots))
        .view(batch.rows, batch.width, *tensor.shape[1:])
        for tensor in tokens
    ]
    chunk = min(CHUNK, 1 << (batch.width - 1).bit_length())
    made = _called(own, padded, options | {"chunk_size": chunk})
    return made.flatten(0, 1).index_select(0, batch.places)


def _called(own: Any, tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    query, key, value, g, beta = tensors
    made: Tensor = own(query, key, value, g=g, beta=beta, **options)[0]
    return made
