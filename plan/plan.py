"""A plan: what a config needs on given GPUs under each strategy, and which one is recommended."""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel

from qwenlora.configs.combinations import SHARDED, ZERO, problems
from qwenlora.configs.estimate import (
    Decision,
    MemoryNeed,
    cut_into,
    decide,
    micro_batch,
    need,
    recomputed_layers,
)
from qwenlora.configs.schema import Config
from qwenlora.data.order import micro_batches, total_steps
from qwenlora.plan.speed import Case, sent, step_time
from qwenlora.run.records import Parameters

FILES_PER_CHECKPOINT = 16
START_S = 60  # of an attempt: imports, weights, joining, the first step
ALIKE = 1.03  # a strategy must be so much faster than a simpler one to be recommended before it
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
Fit = Literal["fits", "tight", "does not fit", "refused"]


class Way(BaseModel, frozen=True):
    """A strategy with a micro-batch. per_device: train.per_device_train_batch_size; recomputed: layers whose
    activations are computed again; sent: bytes that a GPU sends in a step; efficiency: the share of the speed
    that links leave; why: of a refusal."""

    strategy: str
    shard_group: str
    per_device: int
    fit: Fit
    why: str = ""
    memory: MemoryNeed | None = None
    recomputed: int = 0
    step_s: float = 0.0
    tokens_s: float = 0.0
    sent: float = 0.0
    efficiency: float = 0.0

    @property
    def name(self) -> str:
        """The strategy and its groups, in words."""
        return f"{self.strategy} in nodes" if self.shard_group == "node" else self.strategy


class Length(BaseModel, frozen=True):
    """How long a run is under one way. attempts: within the jobs' time limit; 0 without one."""

    steps: int
    hours: float
    gpu_hours: float
    attempts: int = 0


class Plan(BaseModel, frozen=True):
    """What a run needs. ways: all strategies with the config's micro-batch, or another if GPUs cannot share
    it, which refusal says; recommended: over all micro-batches the fastest that fits, None if none does;
    instead: then what would; length: of the run under it, None where its rows are missing; scaling: its speed
    on each GPU, relative to that on one node, None for one node or where one has no room; checkpoint: bytes;
    kept: checkpoints on the disk at the same time, 0: all, of
    a run whose length is not known."""

    ways: list[Way]
    refusal: str
    recommended: Way | None
    instead: str
    length: Length | None
    scaling: float | None
    checkpoint: int
    kept: int


def make_plan(case: Case, limit_min: int | None = None) -> Plan:
    """Return the plan of a run. limit_min: minutes that a job may take."""
    recommended = best_way(case)
    refusal = ""
    try:
        ways = list(_ways(case))
    except ValueError as error:
        shared = next(_sizes(case), None)
        if shared is None:
            raise
        refusal = str(error)
        ways = list(_ways(with_micro_batch(case, recommended.per_device) if recommended else shared))
    return Plan(
        ways=ways,
        refusal=refusal,
        recommended=recommended,
        instead="" if recommended else _instead(next(_sizes(case), case), ways),
        length=_length(case, recommended, limit_min) if recommended and not case.rows.missing else None,
        scaling=_scaling(case, recommended) if recommended else None,
        checkpoint=bytes_of_checkpoint(case.parameters),
        kept=_kept(case),
    )


def bytes_of_checkpoint(parameters: Parameters) -> int:
    """Return the bytes of a checkpoint's tensors: the adapter, and Adam's two moments, in float32."""
    return 4 * (3 * parameters.trainable + parameters.begun)


def _ways(case: Case) -> Iterator[Way]:
    """Yield each strategy with the config's own micro-batch."""
    groups = ("global", "node") if case.machine.nodes > 1 and case.machine.processes > 1 else ("global",)
    names = STRATEGIES if case.machine.world_size > 1 else ("ddp",)
    for name in names:
        for group in groups if name in SHARDED else ("global",):
            yield way(case, name, group)


def way(case: Case, name: str, group: str) -> Way:
    """Return what the config needs under a strategy. Raises: ValueError when the GPUs cannot share the batch
    evenly."""
    config = _with(case.config, name, group)
    if config.train.per_device_train_batch_size == "auto":
        decision, among = Decision(name, group, ""), _sizes_shared(case)
        size = micro_batch(config, case.sizes, decision, case.machine, among, case.machine.gpu_bytes)
        config = cut_into(config, size)
    case = case._replace(config=config)
    if refused := problems(config, case.machine):
        return Way(
            strategy=name,
            shard_group=group,
            per_device=config.train.micro_batch,
            fit="refused",
            why=refused[0],
        )
    return way_with(case, name, group, recomputed_layers(config, case.sizes, name, case.machine, group))


def way_with(case: Case, name: str, group: str, recomputed: int) -> Way:
    """Return what the config needs under a strategy with its own micro-batch and so many layers that are
    computed again, corrected by earlier runs. Raises: ValueError when the GPUs cannot share the batch."""
    by = case.correction(name)
    needed = need(case.config, case.sizes, name, case.machine, group, recomputed)
    off = (by.memory - 1) * (needed.total - needed.reserve)
    needed = needed.model_copy(update={"activations": max(0, int(needed.activations + off))})
    time, moved = step_time(case, name, group, recomputed), sent(case, name, group, recomputed)
    step_s = by.time * time.seconds
    return Way(
        strategy=name,
        shard_group=group,
        per_device=case.config.train.micro_batch,
        fit=_fit(needed, case.gpu.bytes),
        memory=needed,
        recomputed=recomputed,
        step_s=step_s,
        tokens_s=tokens_of_step(case) / step_s,
        sent=case.micro_batches * moved.a_micro_batch + moved.reduced,
        efficiency=time.efficiency,
    )


def tokens_of_step(case: Case) -> float:
    """Return the tokens of rows in a step of the whole run, over all GPUs."""
    each = case.config.data.max_length if case.is_packed else case.rows.mean
    return case.config.train.global_batch_size * each


def _fit(needed: MemoryNeed, there: int) -> Fit:
    if needed.total <= there:
        return "fits"
    return "tight" if needed.least <= there else "does not fit"


def best_way(case: Case) -> Way | None:
    """Return the fastest way that fits, over all micro-batches that GPUs can share; of about equal ones that
    with the smallest micro-batch which sends least, since these come first."""
    best: Way | None = None
    for each in _sizes(case):
        # what needs no DeepSpeed comes first, as for strategy.name: auto
        for found in sorted(_ways(each), key=lambda way: way.strategy in ZERO):
            better = best is None or found.tokens_s > ALIKE * best.tokens_s
            if found.fit == "fits" and better:
                best = found
    return best


def _sizes(case: Case) -> Iterator[Case]:
    """Yield the case with each size of micro-batch that its GPUs can share, the smallest first."""
    with suppress(ValueError):  # there are more GPUs than rows, or they are not divided evenly
        for size in reversed(_sizes_shared(case)):
            yield with_micro_batch(case, size)


def _sizes_shared(case: Case) -> list[int]:
    train, shared = case.config.train, case.config.strategy.sequence_parallel
    return micro_batches(train.global_batch_size, case.machine.world_size, shared)


def with_micro_batch(case: Case, per_device: int) -> Case:
    """Return the case with so many rows, or packs, in a micro-batch."""
    return case._replace(config=cut_into(case.config, per_device))


def _instead(case: Case, ways: list[Way]) -> str:
    """Return why nothing fits, and what would."""
    if all(way.why for way in ways):
        return ways[0].why
    try:
        decide(_with(case.config, "auto", "global"), case.sizes, case.machine)
    except ValueError as error:
        return str(error)
    return "no strategy fits with room to spare; the best is tight"


def _scaling(case: Case, way: Way) -> float | None:
    nodes = case.machine.nodes
    alone = best_way(case._replace(machine=case.machine._replace(nodes=1))) if nodes > 1 else None
    return way.tokens_s / alone.tokens_s / nodes if alone else None


def steps_of(case: Case) -> int:
    """Return the optimizer steps of the run."""
    train = case.config.train
    return total_steps(_of_an_epoch(case), train.global_batch_size, train.num_train_epochs, train.max_steps)


def hours_of(case: Case, way: Way) -> float:
    """Return the hours of the run's steps, as far as an epoch's tokens fill them: the last may have fewer
    rows, and packs have gaps."""
    steps = math.ceil(_of_an_epoch(case) / case.config.train.global_batch_size)
    filled = min(1.0, case.rows.tokens / (tokens_of_step(case) * steps))
    return steps_of(case) * filled * way.step_s / 3600


def _of_an_epoch(case: Case) -> int:
    """Return the rows of an epoch, or its packs."""
    rows = case.rows
    return rows.packs or math.ceil(rows.tokens / case.config.data.max_length) if case.is_packed else rows.rows


def _length(case: Case, way: Way, limit_min: int | None) -> Length:
    steps, hours = steps_of(case), hours_of(case, way)
    usable = limit_min * 60 - START_S if limit_min else 0
    return Length(
        steps=steps,
        hours=hours,
        gpu_hours=hours * case.machine.world_size,
        attempts=math.ceil(3600 * hours / usable) if usable > 0 else 0,
    )


def _kept(case: Case) -> int:
    """Return how many checkpoints are on the disk at the same time: one more while the next is written, but
    no more than are saved."""
    train, steps = case.config.train, steps_of(case)
    by = {"no": 1, "epoch": math.ceil(train.num_train_epochs)}
    saved = by.get(train.save_strategy) or math.ceil(steps / (train.save_steps or steps))
    if train.save_total_limit is None:
        return 0 if case.rows.missing else saved
    kept = train.save_total_limit + (train.metric_for_best_model is not None) + 1
    return kept if case.rows.missing else min(kept, saved)


def _with(config: Config, name: str, group: str) -> Config:
    strategy = config.strategy.model_copy(update={"name": name, "shard_group": group})
    return config.model_copy(update={"strategy": strategy})
