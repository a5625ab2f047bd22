"""What goes wrong in a step, said so that it can be mended: numbers that are none, and a GPU that is full."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from qwenlora.configs import Config

SHOWN = 8
IN_A_ROW = 10  # steps that may be left out one after the other


class TrainingFault(RuntimeError):  # noqa: N818 (it is not said to be an error of the code)
    """The run cannot go on; the text says why and what helps."""


def broken_micro_batches(losses: list[Tensor], team: int, teams: int) -> list[int]:
    """Return which micro-batches of a step have a loss that is not finite; all ranks call it. losses: this
    rank's.

    team, teams: the number of this rank's team and how many there are; each rank is one, unless they share
    sequences.
    """
    mine = [number * teams + team for number, loss in enumerate(losses) if not bool(loss.isfinite())]
    if not dist.is_initialized():
        return mine
    everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, mine)
    return sorted({number for numbers in everyones for number in numbers})


def describe(step: int, what: str, rows: list[int], place: Callable[[int], str]) -> str:
    """Return what is not finite in which step and rows. place: where a row stands, by its number."""
    shown = ", ".join(f"{row} ({place(row)})" for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return (
        f"step {step}: the {what} is not finite (NaN or infinite), in row{'s' * (len(rows) > 1)}"
        f" {shown}{more}"
    )


def out_of_memory(
    config: Config, step: int, rank: int, shape: tuple[int, ...], trained: bool
) -> TrainingFault:
    """Return the error to raise. shape: of the batch's input_ids, [sequences, tokens]."""
    sequences, length = shape
    batch = "per_device_train_batch_size" if trained else "per_device_eval_batch_size"
    size = getattr(config.train, batch)
    cures = []
    if size > 1:
        cures.append(f"train.{batch} ({size})" + (", the global batch stays as it is" if trained else ""))
    cures.append(f"data.max_length ({config.data.max_length:,})")
    lower = f"lower {' or '.join(cures)}"
    further = []
    if trained and not config.train.gradient_checkpointing:
        further.append("train.gradient_checkpointing: true (a third to half slower)")
    if config.strategy.quantization == "none":
        further.append("strategy.quantization: nf4")
    doing = "trained" if trained else "evaluated"
    return TrainingFault(
        f"GPU out of memory on rank {rank} while step {step + trained} was {doing}: a batch of {sequences} x"
        f" {length:,} = {sequences * length:,} tokens did not fit; {lower}"
        + "".join(f", or set {cure}" for cure in further)
    )
