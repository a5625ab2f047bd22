"""Evaluation: a loss that depends neither on the batch size nor on the number of ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwenlora.data.prepared import Side
from qwenlora.run.checkpoints import best_first
from qwenlora.trainer.loop.batches import collate, collate_packs, weight_of
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.stop import Stop


def eval_batches(
    side: Side, per_device: int, world_size: int, rank: int, pad_id: int, *, flat: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's evaluation batches: rows sorted by length, the same number of batches on every rank.
    Which rows share a batch does not depend on world_size, so neither does their loss. flat: as
    StepLoader's."""
    rows = (-side.lengths.astype("int64")).argsort(kind="stable")
    per_turn = per_device * world_size
    for start in range(0, len(rows), per_turn):
        mine = rows[start + rank * per_device : start + (rank + 1) * per_device]
        batch = [side.row(int(number)) for number in mine]
        yield collate_packs([batch], pad_id) if flat else collate(batch, pad_id)


def evaluations_since_best(losses: dict[int, float]) -> int:
    """Return how many evaluations came after the best, of equal ones the first. losses: {step: eval_loss}."""
    return sum(step > best_first(losses)[0] for step in losses)


def sum_losses(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    stop: Stop,
    device: torch.device,
    out_of_memory: Callable[[tuple[int, ...]], TrainingFault],
) -> Tensor | None:
    """Return float64 [2]: the sums of this rank's losses and trained tokens, both weighted where the tokens
    have weights; None when the ranks, which check before each batch, agree to stop. out_of_memory: makes the
    error, from the shape of input_ids."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        stop.agree(device)
        if stop.agreed:
            return None
        try:
            # num_items_in_batch=1 makes the model return the sum over tokens, not their mean
            loss = model(**batch, num_items_in_batch=1).loss.double()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(tuple(batch["input_ids"].shape)) from error
        sums += torch.stack([loss, weight_of([batch], device)])
    return sums


def metrics_of(sums: Tensor) -> dict[str, float]:
    """Return eval_loss and eval_perplexity. sums: of all ranks, as sum_losses returns them."""
    loss = (sums[0] / sums[1]).item()
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
