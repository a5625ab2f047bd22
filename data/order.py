"""Which rows are in which step, and which rank holds which of them.

A step's rows depend on seed, epoch and step alone. They are cut into micro-batches before ranks come in: micro-batch
j goes to rank j % world_size, so any number of ranks computes the same micro-batches and only the place differs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of training.

    lengths: int [rows], tokens. Rows of one step are sorted by it, longest first, which saves padding and lets the
    largest batch come first; it never moves a row to another step.
    """

    lengths: Rows
    global_batch_size: int
    per_device_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last one holds what is left, so no row is dropped or seen twice."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @cached_property
    def _cache(self) -> dict[int, Rows]:
        return {}

    def epoch(self, epoch: int) -> Rows:
        """Return int64 [rows]: all row numbers, shuffled by seed and epoch."""
        if epoch not in self._cache:
            self._cache.clear()
            # RandomState's stream is frozen for all numpy versions (NEP 19), Generator's is not
            generator = np.random.RandomState(np.array([self.seed, epoch], np.uint32))
            self._cache[epoch] = generator.permutation(len(self.lengths)).astype(np.int64)
        return self._cache[epoch]

    def step(self, epoch: int, step: int) -> Rows:
        """Return the row numbers of one optimizer step, longest row first. 0 <= step < steps_per_epoch."""
        rows = self.epoch(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        return rows[np.argsort(-self.lengths[rows], kind="stable")]

    def micro_batches(self, epoch: int, world_size: int, rank: int) -> Iterator[list[int]]:
        """Yield this rank's micro-batches of an epoch, accumulation_steps of them a step; [] where a rank has none."""
        accumulation = accumulation_steps(self.global_batch_size, self.per_device_batch_size, world_size)
        for step in range(self.steps_per_epoch):
            rows = self.step(epoch, step)
            for number in range(accumulation):
                start = (number * world_size + rank) * self.per_device_batch_size
                yield rows[start : start + self.per_device_batch_size].tolist()


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, world_size: int) -> int:
    """Return the micro-batches a rank computes a step.

    Raises: ValueError when global_batch_size is no multiple of per_device_batch_size * world_size.
    """
    at_once = per_device_batch_size * world_size
    if global_batch_size % at_once:
        below = global_batch_size // at_once * at_once
        nearest = ", ".join(str(size) for size in (below, below + at_once) if size)
        raise ValueError(
            f"train.global_batch_size={global_batch_size} is not divisible by"
            f" per_device_train_batch_size * world_size = {per_device_batch_size} * {world_size} = {at_once};"
            f" nearest: {nearest}"
        )
    return global_batch_size // at_once


def total_steps(rows: int, global_batch_size: int, num_train_epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of a whole run."""
    return max_steps or math.ceil(num_train_epochs * math.ceil(rows / global_batch_size))
