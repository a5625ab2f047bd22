"""The nearest changes with which a run would fit its GPUs, for refusals before a start."""

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import ALL_LINEAR, Config

LENGTHS = [2**power for power in range(14, 7, -1)]  # of packs
LEANER = ("train.gradient_checkpointing", "strategy.quantization", "lora.experts")  # keys: less of a GPU


class Setting(NamedTuple):
    """A config on a machine."""

    config: Config
    machine: Machine


class Change(NamedTuple):
    """A change that may make a run fit. key: what it changes; what: as a user writes it; made: makes it."""

    key: str
    what: str
    made: Callable[[Setting], Setting]


def cures(
    setting: Setting,
    fits: Callable[[Setting], str | None],
    *,
    experts: bool,
    keys: Collection[str] | None = None,
) -> Iterator[str]:
    """Yield changes with which a setting fits, the nearest first: one, then two at once. Of values of the
    same keys the first is named, and of two changes none that is enough alone. fits: returns what is to be
    said after a cure, None for what does not fit; experts: whether the adapter has experts; keys: that may be
    changed, default: all."""
    single, told = list(_changes(setting, experts=experts)), set[frozenset[str]]()
    single = [change for change in single if keys is None or change.key in keys]
    for several in (1, 2):
        for changes in itertools.combinations(single, several):
            changed_keys = frozenset(change.key for change in changes)
            if len(changed_keys) < several or any(enough <= changed_keys for enough in told):
                continue
            changed = setting
            for change in changes:
                changed = change.made(changed)
            if (said := fits(changed)) is not None:
                told.add(changed_keys)
                yield " with ".join(change.what for change in changes) + said


def _changes(setting: Setting, *, experts: bool) -> Iterator[Change]:
    """Yield what may be changed, from what costs least."""
    config, machine = setting
    wanted = config.train.gradient_checkpointing  # 1 is equal to True, and not it
    if wanted is not True and wanted != "auto":
        yield _change("train.gradient_checkpointing", "auto")
    if config.train.micro_batch > 1:
        yield _change("train.per_device_train_batch_size", 1)
    if machine.world_size > 1 and config.strategy.name != "auto":
        yield from (
            _change("strategy.name", name) for name in ("fsdp", "zero3") if name != config.strategy.name
        )
    yield from _of_the_model(config, experts=experts)
    for nodes in (2, 4, 8, 16):
        yield _more(config, machine._replace(nodes=nodes * machine.nodes))
    yield from (_change("data.max_length", length) for length in LENGTHS if length < config.data.max_length)


def _of_the_model(config: Config, *, experts: bool) -> Iterator[Change]:
    if config.strategy.quantization == "none" and config.lora.init_lora_weights != "orthogonal":
        yield _change("strategy.quantization", "nf4")
    if experts and config.lora.experts == "all" and config.lora.target_modules == ALL_LINEAR:
        yield _change("lora.experts", "shared")


def _more(config: Config, machine: Machine) -> Change:
    """Return more nodes, with a micro-batch for each of their GPUs."""
    ranks, train = machine.world_size // config.strategy.sequence_parallel, config.train
    changes: dict[str, object] = {}
    if train.global_batch_size < ranks:
        changes["global_batch_size"] = ranks
    if -(-max(train.global_batch_size, ranks) // train.micro_batch) < ranks:
        changes["per_device_train_batch_size"] = 1
    what = " and ".join(
        [f"{machine.world_size} such GPUs", *(f"train.{name}: {value}" for name, value in changes.items())]
    )
    larger = changed_in("train", **changes)
    return Change("GPUs", what, lambda old: larger(old)._replace(machine=machine))


def _change(key: str, value: object) -> Change:
    section, _, name = key.partition(".")
    return Change(key, f"{key}: {value}", changed_in(section, **{name: value}))


def changed_in(section: str, /, **values: object) -> Callable[[Setting], Setting]:
    """Return a function that sets values in a section of a setting's config."""

    def change(setting: Setting) -> Setting:
        changed = getattr(setting.config, section).model_copy(update=values)
        return setting._replace(config=setting.config.model_copy(update={section: changed}))

    return change
