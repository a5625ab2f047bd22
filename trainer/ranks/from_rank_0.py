"""Rank 0 computes a value, and sends it to all ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from qwenlora.trainer.ranks.rendezvous import is_pretended

Answer = TypeVar("Answer")


def from_rank_0(find: Callable[[], Answer]) -> Answer:
    """Return find()'s result on rank 0, or raise its ValueError, on all ranks; all must call it."""
    answer: list[Any] = [None]
    alone = not dist.is_initialized() or is_pretended()
    if alone or dist.get_rank() == 0:
        try:
            answer = [find()]
        except ValueError as refusal:
            answer = [refusal]
    if not alone:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    result: Answer = answer[0]
    return result
