"""The loss of a head that is a frozen matrix, one block of the vocabulary after another.

For CPUs: a block's logits are made in the same memory again and again, so a step is two products and little
else, where logits of the whole vocabulary take half as long again to be written and read. With the label's
logit subtracted, the sum of all exponentials is 1 / the label's probability, and the rows of the matrix, by
their exponentials, add up to the gradient. Where a label is so unlikely that the sum would overflow, the
largest logit is looked for first, and subtracted instead.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# of a block: 36 MB of float32 logits, for smaller ones call more operations; of other dtypes, in which blocks
# are copied twice, 8 MB, for these must stay in the processor's cache
POSITIONS, WORDS, OTHERS_WORDS = 1024, 9216, 4096
LARGE = 1e30  # a sum of exponentials that may have overflowed in its product with the matrix


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
    at_label = matrix[labels].to(states.dtype).float()
    of_label = (states.float() * at_label).sum(1, keepdim=True)
    less = of_label
    total, rows = _sums(matrix, states, less, gradient)
    large = min(LARGE, torch.finfo(states.dtype).max / 64)  # float16 takes no more than 65,504
    if not bool((total < large).all()):  # nor may it be NaN
        less = _largest(matrix, states)
        total, rows = _sums(matrix, states, less, gradient)
    losses = total.double().log_() + (less - of_label)
    return losses.squeeze(1), None if rows is None else rows.div_(total).sub_(at_label)


def _sums(matrix: Tensor, states: Tensor, less: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum over words of exp(logit - less), float32 [positions, 1], and of these times the matrix's
    rows, float32 [positions, hidden]."""
    of_blocks: list[Tensor] = []
    rows = torch.zeros_like(states, dtype=torch.float32) if gradient else None
    for block, logits in _blocks(matrix, states, -less):
        exponentials = logits.exp_()
        of_blocks.append(exponentials.sum(1, keepdim=True))
        if rows is not None:
            rows += exponentials.to(states.dtype) @ block
    return torch.stack(of_blocks).sum(0), rows


def _largest(matrix: Tensor, states: Tensor) -> Tensor:
    """Return the largest logit of each position, float32 [positions, 1]."""
    nothing = states.new_zeros(len(states), 1, dtype=torch.float32)
    of_blocks = [logits.amax(1, keepdim=True) for _, logits in _blocks(matrix, states, nothing)]
    return torch.stack(of_blocks).amax(0)


def _blocks(matrix: Tensor, states: Tensor, more: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of the matrix, and their logits with more added, float32, in memory that the next ones
    take, for new memory would cost more than all but the products. more: float32 [positions, 1]."""
    exact = states.dtype is torch.float32
    words = min(WORDS if exact else OTHERS_WORDS, len(matrix))
    logits = states.new_empty(len(states), words, dtype=torch.float32)
    products = logits if exact else torch.empty_like(logits, dtype=states.dtype)
    for block, turned in zip(torch.split(matrix, words), torch.split(matrix.T, words, 1), strict=True):
        block, turned = block.to(states.dtype), turned.to(states.dtype)
        if len(block) < words:  # the last one
            for memory in (logits, products):
                memory.resize_(len(states), len(block))
        if exact:
            torch.addmm(more, states, turned, out=logits)
        else:
            logits.copy_(torch.mm(states, turned, out=products)).add_(more)
        yield block, logits
