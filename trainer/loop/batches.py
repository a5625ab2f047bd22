"""One rank's micro-batches as tensors: the data's order (data/order.py) as a torch DataLoader."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from qwenlora.data.chat import Tokens
from qwenlora.data.order import MicroBatch, Order
from qwenlora.data.prepared import Side
from qwenlora.trainer.model.loading import IGNORED

WEIGHTS = "loss_weights"


class Rows(NamedTuple):
    """The rows to train, in their order, and to evaluate. place: gives a training row's file and line."""

    order: Order
    train: Side
    evaluation: Side | None = None
    place: Callable[[int], str] = str

    @property
    def weighted(self) -> bool:
        """Whether any token has a weight other than 0 and 1."""
        return any(side is not None and side.weights is not None for side in (self.train, self.evaluation))


class _Units(Dataset[list[Tokens]]):
    def __init__(self, side: Side) -> None:
        self.side = side

    def __getitem__(self, rows: list[int]) -> list[Tokens]:
        return [self.side.row(number) for number in rows]


class _RankOrder(BatchSampler):
    def __init__(self, order: Order, world_size: int, rank: int, accumulation: int) -> None:
        self.order, self.world_size, self.rank, self.accumulation = order, world_size, rank, accumulation
        self.epoch = 0

    def __iter__(self) -> Iterator[MicroBatch]:  # type: ignore[override]
        return self.order.micro_batches(self.epoch, self.world_size, self.rank)

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class StepLoader(DataLoader[list[Tokens]]):
    """One rank's micro-batches of an epoch: the same number on every rank, empty ones as blank rows. flat: a
    micro-batch is one long sequence of its rows, without padding, for attention that keeps them apart. cut:
    returns this rank's slice of a batch, where ranks share sequences; rank and world_size then count
    teams."""

    def __init__(
        self,
        side: Side,
        order: Order,
        world_size: int,
        rank: int,
        accumulation: int,
        pad_id: int,
        *,
        flat: bool,
        cut: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = lambda batch, _: batch,
    ) -> None:
        def collate_units(units: list[list[Tokens]]) -> dict[str, Tensor]:
            rows = [row for unit in units for row in unit]
            if flat:
                return cut(collate_packs([rows], pad_id), pad_id)
            packed = order.packs is not None
            return cut(collate_packs(units, pad_id) if packed else collate(rows, pad_id), pad_id)

        sampler = _RankOrder(order, world_size, rank, accumulation)
        super().__init__(_Units(side), batch_sampler=sampler, collate_fn=collate_units)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Trainer calls this."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def collate(rows: list[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, labels and attention_mask, int64 [rows, longest], padded on the right. Without rows
    the batch is one blank token that trains nothing, so that a rank without work still joins every
    collective."""
    batch = _one_after_the_other([[row] for row in rows], pad_id)
    lengths = torch.tensor([len(row.ids) for row in rows] or [1])
    attended = torch.arange(batch["input_ids"].shape[1]) < lengths.unsqueeze(1)
    return batch | {"attention_mask": attended.long()}


def collate_packs(packs: list[list[Tokens]], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, labels and position_ids, int64 [packs, longest], a pack's rows one after the other.
    Positions start at 0 in every row, by which transformers' attention isolates rows if there is no
    attention_mask and no cache; check_isolation() tests that. Padding counts as rows of one token."""
    batch = _one_after_the_other(packs, pad_id)
    position_ids = torch.zeros_like(batch["input_ids"])
    for number, pack in enumerate(packs):
        positions = torch.cat([torch.arange(0), *(torch.arange(len(row.ids)) for row in pack)])
        position_ids[number, : len(positions)] = positions
    return batch | {"position_ids": position_ids}


def _one_after_the_other(lines: list[list[Tokens]], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids and labels, and loss_weights where rows have weights (chunked_loss.py). lines: the
    rows of each line of the batch. Labels are -100 where a token is not trained, and not shifted: the model
    shifts."""
    width = max([1, *(sum(len(row.ids) for row in line) for line in lines)])
    input_ids = torch.full((max(len(lines), 1), width), pad_id)
    labels = torch.full_like(input_ids, IGNORED)
    for number, line in enumerate(lines):
        start = 0
        for row in line:
            end = start + len(row.ids)
            ids = torch.from_numpy(row.ids.astype("int64"))
            input_ids[number, start:end] = ids
            labels[number, start:end] = ids.where(torch.from_numpy(row.trained.copy()), IGNORED)
            start = end
    return {"input_ids": input_ids, "labels": labels} | _loss_weights(lines, width)


def _loss_weights(rows: list[list[Tokens]], width: int) -> dict[str, Tensor]:
    """Return a batch's loss_weights; empty when no row has weights. rows: one after the other in each line of
    the batch, width tokens."""
    if all(row.weights is None for line in rows for row in line):
        return {}
    weights = torch.zeros(len(rows), width)
    for number, line in enumerate(rows):
        given = torch.cat([torch.from_numpy(row.given_weights()) for row in line])
        weights[number, : len(given) - 1] = given[1:]
    return {WEIGHTS: weights}


def weight_of(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return the sum of batches' weights, a float64 scalar: of trained tokens where they have none."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        total += _weight_of(batch).to(device)
    return total


def _weight_of(batch: dict[str, Tensor]) -> Tensor:
    if WEIGHTS in batch:
        return batch[WEIGHTS].double().sum()
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != IGNORED).double().sum()


def seed_micro_batch(seed: int, step: int, number: int, slice_number: int = 0) -> None:
    """Seed torch for a micro-batch by the run's seed, the step and the micro-batch's number in it alone. So
    dropout is the same after a resume, and on any number of ranks. slice_number: of this rank's slice of the
    micro-batch, where ranks share it: each slice has masks of its own."""
    entropy = [seed, step, number, slice_number] if slice_number else [seed, step, number]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)
