"""Faults of a step, and their remedies: losses and gradients that are not finite, and a full GPU."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qwenlora.configs import Config
from qwenlora.run.format import and_more

SHOWN = 8  # rows that a message names
IN_A_ROW = 10  # consecutive steps that may be left out


class TrainingFault(RuntimeError):  # noqa: N818 (it is no error of the code)
    """The run cannot go on; the message says why and what helps. bad_ranks: those whose nodes are bad."""

    def __init__(self, message: str, bad_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.bad_ranks = list(bad_ranks)


def broken_micro_batches(losses: list[Tensor], team: int, teams: int) -> list[int]:
    """Return the numbers of the step's micro-batches whose loss is not finite; all ranks call it. losses: of
    this rank's micro-batches. A team is one rank, unless ranks share sequences."""
    mine = [number * teams + team for number, loss in enumerate(losses) if not bool(loss.isfinite())]
    if not dist.is_initialized():
        return mine
    of_ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    return sorted({number for numbers in of_ranks for number in numbers})


def unlike_rank_0(mine: Tensor) -> list[int]:
    """Return the ranks whose tensor differs from rank 0's; all ranks call it, with tensors of one shape."""
    of_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    return [rank for rank, theirs in enumerate(of_ranks) if not torch.equal(theirs, of_ranks[0])]


def describe(step: int, what: str, rows: list[int], place: Callable[[int], str]) -> str:
    """Return a message: what is not finite, in which step and rows. place: gives a row's file and line."""
    shown = ", ".join(f"{row} ({place(row)})" for row in rows[:SHOWN])
    return (
        f"step {step}: the {what} is not finite (NaN or infinite), in row{'s' * (len(rows) > 1)}"
        f" {shown}{and_more(rows, SHOWN)}"
    )


def out_of_memory(
    config: Config, step: int, rank: int, shape: tuple[int, ...], trained: bool
) -> TrainingFault:
    """Return the error for a batch that did not fit. step: the last one done; shape: of the batch's
    input_ids, [sequences, tokens]; trained: false while evaluating."""
    sequences, length = shape
    batch = "per_device_train_batch_size" if trained else "per_device_eval_batch_size"
    size = getattr(config.train, batch)
    to_lower = []
    if size > 1:
        to_lower.append(f"train.{batch} ({size})" + (", the global batch stays as it is" if trained else ""))
    to_lower.append(f"data.max_length ({config.data.max_length:,})")
    to_set = []
    if trained and config.train.gradient_checkpointing is not True:
        to_set.append("train.gradient_checkpointing: true (a third to half slower)")
    if config.strategy.quantization == "none":
        to_set.append("strategy.quantization: nf4")
    doing = "trained" if trained else "evaluated"
    return TrainingFault(
        f"GPU out of memory on rank {rank} while step {step + trained} was {doing}: a batch of {sequences} x"
        f" {length:,} = {sequences * length:,} tokens did not fit; lower {' or '.join(to_lower)}"
        + "".join(f", or set {setting}" for setting in to_set)
    )
