"""Micro-batches of one rank as tensors: the data's order (data/order.py) made into a torch DataLoader."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from qwenlora.data.chat import Tokens
from qwenlora.data.order import MicroBatch, Order
from qwenlora.data.prepared import Side
from qwenlora.trainer.model.base import IGNORED


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
    """One rank's micro-batches of an epoch, the same number on every rank, empty ones as blank rows.

    flat: packs go into the model as one long sequence, which flash attention wants; else as rows of a batch.
    cut: takes what this rank holds of a batch, where ranks share them; rank and world_size are then their
    teams'.
    """

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
        def batch(units: list[list[Tokens]]) -> dict[str, Tensor]:
            if order.packs is None:
                return cut(collate([row for unit in units for row in unit], pad_id), pad_id)
            return cut(
                collate_packs([[row for unit in units for row in unit]] if flat else units, pad_id), pad_id
            )

        sampler = _RankOrder(order, world_size, rank, accumulation)
        super().__init__(_Units(side), batch_sampler=sampler, collate_fn=batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration walks; Trainer calls it."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def eval_batches(
    side: Side, per_device: int, world_size: int, rank: int, pad_id: int
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's evaluation batches: rows sorted by length, the same number of batches on every rank.

    Which rows share a batch does not depend on world_size, so neither does what is computed for them.
    """
    rows = (-side.lengths.astype("int64")).argsort(kind="stable")
    at_once = per_device * world_size
    for start in range(0, len(rows), at_once):
        mine = rows[start + rank * per_device : start + (rank + 1) * per_device]
        yield collate([side.row(int(number)) for number in mine], pad_id)


def collate(rows: list[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, labels and attention_mask, int64 [rows, longest], padded on the right.

    No rows give one blank token that trains nothing, so that a rank without work still joins every
    collective. Labels are -100 where a token is not trained. Not shifted: the model shifts.
    """
    width = max((len(row.ids) for row in rows), default=1)
    shape = (max(len(rows), 1), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    attention_mask[:, 0] = 1
    for number, row in enumerate(rows):
        length = len(row.ids)
        ids = torch.from_numpy(row.ids.astype("int64"))
        input_ids[number, :length] = ids
        labels[number, :length] = ids.where(torch.from_numpy(row.trained.copy()), IGNORED)
        attention_mask[number, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def collate_packs(packs: list[list[Tokens]], pad_id: int) -> dict[str, Tensor]:
    """Return input_ids, labels and position_ids, int64 [packs, longest], the rows of a pack one after the
    other.

    Positions start at 0 with every row: transformers' attention keeps rows apart by that, as long as there is
    no attention_mask and no cache. Padding is rows of one token. model.check_isolation() makes sure.
    """
    width = max((sum(len(row.ids) for row in pack) for pack in packs), default=1)
    shape = (max(len(packs), 1), max(width, 1))
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            end = start + len(row.ids)
            ids = torch.from_numpy(row.ids.astype("int64"))
            input_ids[number, start:end] = ids
            labels[number, start:end] = ids.where(torch.from_numpy(row.trained.copy()), IGNORED)
            position_ids[number, start:end] = torch.arange(len(ids))
            start = end
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
