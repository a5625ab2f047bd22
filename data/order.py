"""The rows of each step, and the ranks that compute them.

The rows and micro-batches of a step depend on seed, epoch and step alone. Rank j % world_size computes
micro-batch j, so that any number of ranks computes the same micro-batches. Where ranks share sequences, a
rank here is a team of them (trainer/spread/sequence.py). A unit is a row, or with packing a pack of rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qwenlora.data.packing import Packs, spread
from qwenlora.run.format import count as in_words

Rows = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Order:
    """The order of training.

    lengths: int [rows], tokens. The units of a step are sorted by them, longest first: that saves padding,
    gives ranks about equal work and computes the largest batch first. No row moves to another step.
    packs: groups of rows, each at most max_length; None: each row is a unit.
    """

    lengths: Rows
    global_batch_size: int
    per_device_batch_size: int
    seed: int
    packs: Packs | None = None
    max_length: int = 0

    @property
    def units(self) -> int:
        """Packs or rows of an epoch."""
        return len(self.lengths) if self.packs is None else len(self.packs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last has the remaining units: no row is dropped or seen twice."""
        return math.ceil(self.units / self.global_batch_size)

    @cached_property
    def _cache(self) -> dict[int, Rows]:
        return {}

    @cached_property
    def _steps(self) -> dict[tuple[int, int], list[list[int]]]:
        return {}

    @cached_property
    def _unit_lengths(self) -> Rows:
        return self.lengths if self.packs is None else self.packs.lengths(self.lengths)

    def epoch(self, epoch: int) -> Rows:
        """Return int64 [units]: all units by number, shuffled by seed and epoch."""
        if epoch not in self._cache:
            self._cache.clear()
            # RandomState's stream is frozen for all numpy versions (NEP 19), Generator's is not
            generator = np.random.RandomState(np.array([self.seed, epoch], np.uint32))
            self._cache[epoch] = generator.permutation(self.units).astype(np.int64)
        return self._cache[epoch]

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of a step, which is counted from 0 over all epochs."""
        return [row for unit in self.step(*divmod(step, self.steps_per_epoch)) for row in unit]

    def step(self, epoch: int, step: int) -> list[list[int]]:
        """Return the row numbers of each unit of a step (below steps_per_epoch), the longest unit first."""
        if (epoch, step) not in self._steps:
            self._steps.clear()
            self._steps[epoch, step] = self._step(epoch, step)
        return self._steps[epoch, step]

    def _step(self, epoch: int, step: int) -> list[list[int]]:
        units = self.epoch(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        units = units[np.argsort(-self._unit_lengths[units].astype(np.int64), kind="stable")]
        if self.packs is None:
            return [[unit] for unit in units.tolist()]
        packs = [self.packs[unit].tolist() for unit in units.tolist()]
        if len(packs) < self.global_batch_size:  # the last step: else some ranks would have no pack
            rows = np.concatenate(packs)
            dealt = spread(self.lengths[rows], self.global_batch_size, self.max_length)
            packs = packs if dealt is None else [rows[pack].tolist() for pack in dealt if pack]
            packs.sort(key=lambda pack: -int(self.lengths[pack].sum()))
        return packs

    def longest(self, count: int) -> list[list[int]]:
        """Return the row numbers of the longest units: no micro-batch of so many has more tokens."""
        units = np.argsort(-self._unit_lengths.astype(np.int64), kind="stable")[:count].tolist()
        return [[unit] if self.packs is None else self.packs[unit].tolist() for unit in units]

    def micro_batch(self, step: int, number: int) -> list[list[int]]:
        """Return the row numbers of each unit of a micro-batch. step: of the run, from 0; number: in it."""
        units = self.step(*divmod(step, self.steps_per_epoch))
        return units[number * self.per_device_batch_size : (number + 1) * self.per_device_batch_size]

    def tokens_of_ranks(self, step: int, world_size: int) -> Rows:
        """Return int64 [world_size]: the tokens that each rank has in a step of the run, from 0."""
        tokens, at_once = np.zeros(world_size, np.int64), self.per_device_batch_size
        units = self.step(*divmod(step, self.steps_per_epoch))
        for number, start in enumerate(range(0, len(units), at_once)):
            rows = [row for unit in units[start : start + at_once] for row in unit]
            tokens[number % world_size] += self.lengths[rows].sum()
        return tokens

    def micro_batches(self, epoch: int, world_size: int, rank: int) -> Iterator["MicroBatch"]:
        """Yield this rank's micro-batches: accumulation_steps in each step, of which some may be empty."""
        accumulation = accumulation_steps(self.global_batch_size, self.per_device_batch_size, world_size)
        starts = [(number * world_size + rank) * self.per_device_batch_size for number in range(accumulation)]
        for step in range(self.steps_per_epoch):
            for start in starts:
                yield MicroBatch(self, epoch, step, start)


class MicroBatch:
    """The units of one micro-batch, looked up only when it is iterated: a resume skips a million at once."""

    __slots__ = ("epoch", "order", "start", "step")

    def __init__(self, order: Order, epoch: int, step: int, start: int) -> None:
        self.order, self.epoch, self.step, self.start = order, epoch, step, start

    def __iter__(self) -> Iterator[list[int]]:
        units = self.order.step(self.epoch, self.step)
        return iter(units[self.start : self.start + self.order.per_device_batch_size])


def micro_batches(global_batch_size: int, world_size: int, sequence_parallel: int = 1) -> list[int]:
    """Return the sizes of micro-batches with which all ranks have about the same work, the largest first.
    Raises: ValueError when there are more ranks than rows, or they cannot be divided evenly."""
    of_a_team = accumulation_steps(global_batch_size, 1, world_size, sequence_parallel)
    teams = teams_of(world_size, sequence_parallel)
    small = [size for size in range(1, math.isqrt(of_a_team) + 1) if of_a_team % size == 0]
    sizes = sorted({*small, *(of_a_team // size for size in small)}, reverse=True)
    return [size for size in sizes if -(-global_batch_size // size) >= teams]


def accumulation_steps(
    global_batch_size: int, per_device_batch_size: int, world_size: int, sequence_parallel: int = 1
) -> int:
    """Return the micro-batches a rank computes in a step, blank ones included: some ranks have one less to
    compute where the ranks do not divide them. sequence_parallel: ranks that share each of them. Raises:
    ValueError when there are more ranks than micro-batches, or they cannot be divided evenly."""
    teams = teams_of(world_size, sequence_parallel)
    count = -(-global_batch_size // per_device_batch_size)
    if count < teams:
        smaller = max(1, global_batch_size // teams)
        cure = f"train.per_device_train_batch_size: {smaller}"
        if smaller * teams > global_batch_size:
            cure = f"train.global_batch_size: {teams} or more"
            cure += ", and train.per_device_train_batch_size: 1" * (per_device_batch_size > 1)
        ranks = f"{world_size} processes{f' / {sequence_parallel} a sequence' * (sequence_parallel > 1)}"
        raise ValueError(
            f"train.global_batch_size={global_batch_size} makes {in_words(count, 'micro-batch', 'es')}"
            f" of per_device_train_batch_size={per_device_batch_size}, fewer than {ranks}; set {cure}"
        )
    return -(-count // teams)


def idle_share(
    global_batch_size: int, per_device_batch_size: int, world_size: int, sequence_parallel: int = 1
) -> float:
    """Return the share of a step in which ranks have no micro-batch, since they do not divide it."""
    steps = accumulation_steps(global_batch_size, per_device_batch_size, world_size, sequence_parallel)
    count = -(-global_batch_size // per_device_batch_size)
    return 1 - count / (steps * teams_of(world_size, sequence_parallel))


def teams_of(world_size: int, sequence_parallel: int) -> int:
    """Return the number of teams of ranks that share sequences. Raises: ValueError when it is no integer."""
    if world_size % sequence_parallel:
        fit = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise ValueError(
            f"strategy.sequence_parallel={sequence_parallel} does not divide the number of processes,"
            f" {world_size}; set it to one of {fit}, or change launch.nproc_per_node"
        )
    return world_size // sequence_parallel


def total_steps(units: int, global_batch_size: int, num_train_epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of a whole run."""
    return max_steps or math.ceil(num_train_epochs * math.ceil(units / global_batch_size))
