"""Checks of a loaded model: whether packed rows are isolated, and its turn tokens were trained."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwenlora.data.turns import TURN_END, TURN_START

# of the logits' spread: isolated rows differ by rounding, or by int8's outlier columns; leaking ones by 0.4
LEAK = 0.02


def check_isolation(model: Any) -> None:
    """Refuse to pack rows where attention lets one see another: some kernels and versions do so silently.
    When the first of two packed rows is changed, the second's logits must stay. Raises: ValueError."""
    width, vocabulary = 16, int(model.get_input_embeddings().weight.shape[0])
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
    change, scale = (logits[0] - logits[1]).abs().max().item(), logits[0].std().item()
    if not change <= LEAK * scale:  # not `>`: NaN must be refused, too
        raise ValueError(
            "packed rows would see each other: with"
            f" model.attn_implementation={model.config._attn_implementation} and this model, changing one row"
            f" moves the next one's logits by {change:.2g} (their spread: {scale:.2g}); set data.packing:"
            " off, or model.attn_implementation: sdpa"
        )


def untrained_turn_tokens(model: Any, tokenizer: Any) -> list[str]:
    """Return those of <|im_start|> and <|im_end|> whose embeddings the base model never learnt. Embeddings
    past the tokenizer's last id were never trained, and lie close together; so does an untrained turn token.
    Empty when there are too few of them, or they are as scattered as words are (random weights)."""
    weight = whole_weight(model.get_input_embeddings().weight)
    unused = weight[len(tokenizer) :].float()
    if len(unused) < 8:
        return []
    centre = unused.mean(0)
    spread = (unused - centre).norm(dim=-1).max()
    words = weight[torch.linspace(0, len(tokenizer) - 1, 1000, device=weight.device).long()].float()
    typical = (words - centre).norm(dim=-1).median()
    if spread > typical / 2:
        return []
    tokens = [TURN_START, TURN_END]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens), device=weight.device)
    close = (weight[ids].float() - centre).norm(dim=-1) <= 2 * spread + 1e-6 * typical
    return [token for token, untrained in zip(tokens, close.tolist(), strict=True) if untrained]


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
