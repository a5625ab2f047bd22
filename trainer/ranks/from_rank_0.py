"""Rank 0 finds out, and all ranks know."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


def from_rank_0(find: Callable[[], Answer]) -> Answer:
    """Return what find returns on rank 0; all ranks must call it, and only rank 0 calls find.

    Raises: the ValueError that find raises, on all ranks.
    """
    answer: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [find()]
        except ValueError as refusal:
            answer = [refusal]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    result: Answer = answer[0]
    return result
