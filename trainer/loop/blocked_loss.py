"""The loss of a head that is a frozen matrix, one block of the vocabulary after another.

For CPUs: a block's logits stay in the processor's cache, so a step is two products and little else, where
logits of the whole vocabulary take half as long again to be written and read. Each block gives the log of its
own sum of exponentials, and the mean of its rows by its own probabilities; its weight is its share of all
exponentials so far. The largest logit of a block is subtracted before exp(), so nothing overflows.
"""

from typing import Any

import torch
from torch import Tensor, nn

POSITIONS, WORDS = 1024, 4096  # of a block: 16 MB of float32 logits


def is_matrix(head: Any) -> bool:
    """Say whether a head does nothing but multiply with a frozen weight."""
    plain: bool = type(head) is nn.Linear and getattr(head, "bias", None) is None
    return plain and not head.weight.requires_grad


def blocked_loss(
    matrix: Tensor, states: Tensor, labels: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of positions, float64, and the gradient of their sum where asked for, float32
    [positions, hidden].

    matrix: [vocabulary, hidden]; states: [positions, hidden], under autocast multiplied in its dtype, else in
    the matrix's; labels: int64 [positions].
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype
    losses: list[Tensor] = []
    slopes: list[Tensor] = []
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        for some, their_labels in zip(
            torch.split(states, POSITIONS), torch.split(labels, POSITIONS), strict=True
        ):
            loss, slope = _of_positions(matrix, some.to(dtype), their_labels, gradient)
            losses.append(loss)
            slopes += [] if slope is None else [slope]
    return torch.cat(losses), torch.cat(slopes) if gradient else None


def _of_positions(
    matrix: Tensor, states: Tensor, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what blocked_loss() does, of as many positions as a block has."""
    total = states.new_full((len(states), 1), -torch.inf, dtype=torch.float32)  # log of the sum so far
    mean = torch.zeros_like(states, dtype=torch.float32)  # of the matrix's rows so far, by probability
    for block in torch.split(matrix, WORDS):
        block = block.to(states.dtype)
        logits = (states @ block.T).float()
        largest = logits.amax(1, keepdim=True)
        probabilities = logits.softmax(1)
        # the probability of the largest says what softmax divided by
        of_block = largest - probabilities.amax(1, keepdim=True).log_()
        total = torch.logaddexp(total, of_block)
        if gradient:
            mean.lerp_((probabilities.to(states.dtype) @ block).float(), (of_block - total).exp_())
    at_label = matrix[labels].to(states.dtype).float()
    losses = total.squeeze(1).double() - (states.float() * at_label).sum(1).double()
    return losses, mean.sub_(at_label) if gradient else None
