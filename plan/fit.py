"""Whether a config can fit its GPUs at all, and the nearest changes with which it would."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwenlora.configs.combinations import Machine, packs_rows, problems
from qwenlora.configs.estimate import MemoryNeed, Sizes, need
from qwenlora.configs.schema import ALL_LINEAR, Config
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import Gpu
from qwenlora.plan.shape import Shape

ERROR = 0.1  # how far estimates of memory are off as a rule (docs/planning.md)
SHOWN = 3  # changes that a refusal names
LENGTHS = [2**power for power in range(14, 8, -1)]  # of packs


class Setting(NamedTuple):
    """A config on a machine."""

    config: Config
    machine: Machine


class Change(NamedTuple):
    """A change that may make a run fit. key: what it changes; what: as a user writes it; made: makes it."""

    key: str
    what: str
    made: Callable[[Setting], Setting]


def check(config: Config, machine: Machine, gpu: Gpu) -> str:
    """Return a warning when a run cannot fit its GPUs and launch.plan is warn; else an empty text. A base
    whose shape is not known is not judged. Raises: ValueError when it cannot fit and launch.plan is
    refuse."""
    if config.launch.plan == "off" or not machine.gpus:
        return ""
    try:
        shape, _ = shape_of_base(config.model)
        count(shape, config.lora)
    except ValueError:
        return ""  # the preparation says it, or it is a model that a plan does not know
    flaw = _flaw(Setting(config, machine._replace(gpu_bytes=gpu.bytes, nvlink=gpu.nvlink > 0)), shape, gpu)
    if flaw and config.launch.plan == "refuse":
        raise ValueError(f"{flaw}; launch.plan: warn to try all the same")
    return flaw


def _flaw(setting: Setting, shape: Shape, gpu: Gpu) -> str:
    """Return why a setting cannot fit, and what would; empty if it may fit."""
    needed = least(setting, shape)
    if needed.least <= (1 + ERROR) * gpu.bytes:
        return ""
    config, machine = setting
    base = needed.weights + needed.gathered
    gpus = "the GPU" if machine.world_size == 1 else f"each of {machine.world_size} GPUs"
    ways = list(itertools.islice(cures(setting, shape), SHOWN))
    cure = " or ".join(ways) or "a smaller base model or larger GPUs"
    return (
        f"strategy.name={config.strategy.name}: model.name_or_path={config.model.name_or_path} needs at least"
        f" {_gb(needed.least)} of {gpus}, and a {gpu.name} has {_gb(gpu.bytes)} ({_gb(base)} base,"
        f" {_gb(needed.trained)} adapter); what would fit: {cure}"
    )


def least(setting: Setting, shape: Shape) -> MemoryNeed:
    """Return what a setting needs at least; with strategy.name: auto under the strategy that needs least.
    Rows that are not packed count next to nothing: how long they are is not known yet."""
    config, machine = setting
    longest = 0 if packs_rows(config, on_gpu=True) else 1
    sizes = Sizes.of(count(shape, config.lora), longest=longest)
    if config.strategy.name != "auto":
        return need(config, sizes, config.strategy.name, machine, config.strategy.shard_group)
    named = [_under(name, setting) for name in ("zero3", "fsdp") if machine.world_size > 1]
    allowed = [_under("ddp", setting), *(each for each in named if not problems(each, machine))]
    return min(
        (need(each, sizes, each.strategy.name, machine) for each in allowed), key=lambda needed: needed.least
    )


def _under(name: str, setting: Setting) -> Config:
    return _section("strategy", name=name, shard_group="global")(setting).config


def cures(setting: Setting, shape: Shape) -> Iterator[str]:
    """Yield changes with which a setting fits, the nearest first: one, then two at once. Of values of the
    same keys the first is named, and of two changes none that is enough alone."""
    single, told = list(_changes(setting, shape)), set[frozenset[str]]()
    for several in (1, 2):
        for changes in itertools.combinations(single, several):
            keys = frozenset(change.key for change in changes)
            if len(keys) < several or any(enough <= keys for enough in told):
                continue
            changed = setting
            for change in changes:
                changed = change.made(changed)
            if _fits(changed, shape):
                told.add(keys)
                yield " with ".join(change.what for change in changes)


def _fits(setting: Setting, shape: Shape) -> bool:
    config, machine = setting
    return not problems(config, machine) and least(setting, shape).total <= machine.gpu_bytes


def _changes(setting: Setting, shape: Shape) -> Iterator[Change]:
    """Yield what may be changed, from what costs least."""
    config, machine = setting
    if config.train.gradient_checkpointing not in (True, "auto"):
        yield _change("train.gradient_checkpointing", "auto")
    if config.train.micro_batch > 1:
        yield _change("train.per_device_train_batch_size", 1)
    if machine.world_size > 1 and config.strategy.name != "auto":
        yield from (
            _change("strategy.name", name) for name in ("fsdp", "zero3") if name != config.strategy.name
        )
    if shape.num_experts and config.lora.experts == "all" and config.lora.target_modules == ALL_LINEAR:
        yield _change("lora.experts", "shared")
    if config.strategy.quantization == "none":
        yield _change("strategy.quantization", "nf4")
    yield from (_change("data.max_length", length) for length in LENGTHS if length < config.data.max_length)
    for nodes in (2, 4, 8, 16):
        yield _more(config, machine._replace(nodes=nodes * machine.nodes))


def _more(config: Config, machine: Machine) -> Change:
    """Return more nodes, with a global batch that their GPUs can share."""
    smallest = machine.world_size // config.strategy.sequence_parallel
    batch = -(-config.train.global_batch_size // smallest) * smallest
    changes: dict[str, object] = {"global_batch_size": batch}
    what = f"{machine.world_size} such GPUs"
    if batch != config.train.global_batch_size:
        what += f" (train.global_batch_size: {batch})"
    if batch % (smallest * config.train.micro_batch):
        changes["per_device_train_batch_size"] = 1
    larger = _section("train", **changes)
    return Change("GPUs", what, lambda old: larger(old)._replace(machine=machine))


def _change(key: str, value: object) -> Change:
    section, _, name = key.partition(".")
    return Change(key, f"{key}: {value}", _section(section, **{name: value}))


def _section(section: str, /, **values: object) -> Callable[[Setting], Setting]:
    def change(setting: Setting) -> Setting:
        changed = getattr(setting.config, section).model_copy(update=values)
        return setting._replace(config=setting.config.model_copy(update={section: changed}))

    return change


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
