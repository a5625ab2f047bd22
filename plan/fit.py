"""Whether a config can fit its GPUs at all, and the nearest changes with which it would."""

from collections.abc import Iterator

from qwenlora.configs.combinations import Machine, packs_rows, problems
from qwenlora.configs.cures import Setting, changed_in, cures
from qwenlora.configs.estimate import MemoryNeed, Sizes, need, too_little
from qwenlora.configs.schema import Config
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import Gpu
from qwenlora.plan.rows import tokens_of_few
from qwenlora.plan.shape import Shape

ERROR = 0.1  # how far estimates of memory are off as a rule (docs/planning.md)


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
    setting = Setting(config, machine._replace(gpu_bytes=gpu.bytes, nvlink=gpu.nvlink > 0))
    # unpacked rows count next to nothing: how long they are is not known yet
    longest = tokens_of_few(config.data) if packs_rows(config, on_gpu=True) else 1
    flaw = _flaw(setting, shape, longest, gpu)
    if flaw and config.launch.plan == "refuse":
        raise ValueError(f"{flaw}; launch.plan: warn to try all the same")
    return flaw


def _flaw(setting: Setting, shape: Shape, longest: int, gpu: Gpu) -> str:
    """Return why a setting cannot fit, and what would; empty if it may fit."""
    needed = least(setting, shape, longest)
    if needed.least <= (1 + ERROR) * gpu.bytes:
        return ""
    sizes = Sizes.of(count(shape, setting.config.lora), longest)
    return too_little(setting, sizes, needed, cures_of(setting, shape, longest), f", and a {gpu.name} has")


def least(setting: Setting, shape: Shape, longest: int = 0) -> MemoryNeed:
    """Return what a setting needs at least; with strategy.name: auto under the strategy that needs least.
    longest: tokens of the longest row or pack, 0: data.max_length."""
    config, machine = setting
    sizes = Sizes.of(count(shape, config.lora), longest)
    if config.strategy.name != "auto":
        return need(config, sizes, config.strategy.name, machine, config.strategy.shard_group)
    named = [_under(name, setting) for name in ("zero3", "fsdp") if machine.world_size > 1]
    allowed = [_under("ddp", setting), *(each for each in named if not problems(each, machine))]
    return min(
        (need(each, sizes, each.strategy.name, machine) for each in allowed), key=lambda needed: needed.least
    )


def _under(name: str, setting: Setting) -> Config:
    return changed_in("strategy", name=name, shard_group="global")(setting).config


def cures_of(setting: Setting, shape: Shape, longest: int = 0) -> Iterator[str]:
    """Yield changes with which a setting fits, the nearest first. longest: as least has it."""

    def fits(changed: Setting) -> str | None:
        refused = problems(changed.config, changed.machine)
        return (
            "" if not refused and least(changed, shape, longest).total <= changed.machine.gpu_bytes else None
        )

    experts = count(shape, setting.config.lora).experts_trained > 0
    return cures(setting, fits, experts=experts)
