"""Checks of a loaded model: whether packed rows are isolated, and its tokens were trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwenlora.data.bad_row import printable
from qwenlora.data.turns import TURN_END, TURN_START
from qwenlora.trainer.model.pretrained import layer_kinds
from qwenlora.trainer.model.row_attention import LINEAR, takes_rows_end_to_end

# of the logits' spread: isolated rows differ by rounding, or by int8's outlier columns; leaking ones by 0.4
LEAK = 0.02
# of a word's usual distance from the mean: new embeddings are drawn with a 1e-9th of the words' covariance,
# and bfloat16 rounds them
NEAR_MEAN = 0.01
IDS_AT_ONCE = 4096  # embeddings that are converted to float32 at a time


def check_isolation(model: Any) -> None:
    """Refuse to pack rows where attention lets one see another: some kernels and versions do so silently.
    Raises: ValueError."""
    change, scale = _leak(model)
    if not _is_small(change, scale):
        another = f", or model.attn_implementation: {'eager' if takes_rows_end_to_end(model) else 'sdpa'}"
        raise ValueError(
            "packed rows would see each other: with"
            f" model.attn_implementation={model.config._attn_implementation} and this model, changing one row"
            f" moves the next one's logits by {change:.2g} (their spread: {scale:.2g}); set data.packing: off"
            + ("" if LINEAR in layer_kinds(model.config) else another)  # it may be no matter of attention
        )


def isolates_rows(model: Any) -> bool:
    """Whether rows that lie end to end do not see each other."""
    return _is_small(*_leak(model))


def _leak(model: Any) -> tuple[float, float]:
    """Return how far the second of two rows' logits move when the first is changed, and their spread."""
    width, vocabulary = 16, model.config.get_text_config().vocab_size  # ZeRO-3's weights here have no size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(min(vocabulary, 1000), (3, width), generator=generator)
    positions = torch.arange(width).repeat(2).unsqueeze(0).to(model.device)
    was_training = model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for first in (0, 1):
            pack = torch.cat([rows[first], rows[2]]).unsqueeze(0).to(model.device)
            output = model(input_ids=pack, position_ids=positions, use_cache=False)
            logits.append(output.logits[0, width:].float())
    model.train(was_training)
    return (logits[0] - logits[1]).abs().max().item(), logits[0].std().item()


def _is_small(change: float, scale: float) -> bool:
    return change <= LEAK * scale  # not for NaN


def untrained_tokens(model: Any, tokenizer: Any, used: Iterable[int]) -> dict[int, str]:
    """Return {id: token} of those whose embeddings the base never learnt, of <|im_start|>, <|im_end|> and the
    ids that the rows use. Such embeddings lie together: with those past the tokenizer's last id, which nobody
    trained, or at the mean of all, where transformers' resize_token_embeddings puts new ones. None are found
    where those past the last id are too few, or as scattered as words are (random weights)."""
    weight = whole_weight(model.get_input_embeddings().weight)
    words = weight[torch.linspace(0, len(tokenizer) - 1, 1000, device=weight.device).long()].float()
    mean = weight.mean(0, dtype=torch.float32)
    places = [(mean, NEAR_MEAN * _typical(words, mean))]
    unused = weight[len(tokenizer) :].float()
    if len(unused) >= 8:
        centre = unused.mean(0)
        spread, typical = (unused - centre).norm(dim=-1).max(), _typical(words, centre)
        if spread <= typical / 2:
            places.append((centre, 2 * spread + 1e-6 * typical))
    turns = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    ids = torch.tensor(list(dict.fromkeys([*turns, *map(int, used)])), device=weight.device)
    ids = ids[ids < len(weight)]
    close = [
        torch.stack([(weight[part].float() - place).norm(dim=-1) <= reach for place, reach in places]).any(0)
        for part in torch.split(ids, IDS_AT_ONCE)
    ]
    return {token: printable(tokenizer.decode([token])) for token in ids[torch.cat(close)].tolist()}


def _typical(words: Tensor, centre: Tensor) -> Tensor:
    """Return a word's usual distance from a place."""
    typical: Tensor = (words - centre).norm(dim=-1).median()
    return typical


def whole_weight(weight: Tensor) -> Tensor:
    """Return a weight of the base as one tensor; where it is sharded, all ranks call this."""
    if isinstance(weight, DTensor):
        gathered: Tensor = DTensor.full_tensor(weight).detach()
        return gathered
    if hasattr(weight, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()
