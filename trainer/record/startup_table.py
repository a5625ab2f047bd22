"""What follows from a config and is shown before the first step: counts, sizes, and what deserves a
warning."""

import math
from typing import Any

import torch
from transformers import TrainingArguments

from qwenlora.configs import Config
from qwenlora.run.records import Facts, SideCounts
from qwenlora.trainer.model.base import TINY, pick_dtype
from qwenlora.trainer.model.lora import EMBEDDINGS
from qwenlora.trainer.spread.strategy import Spread


def facts(
    config: Config, known: Facts, args: TrainingArguments, world_size: int, spread: Spread
) -> dict[str, str]:
    """Return the start-up table's rows."""
    parameters, train = known.parameters, known.data["train"]
    share = parameters.trainable / (parameters.total + parameters.trainable)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    dtype = str(pick_dtype(config.model.dtype)).removeprefix("torch.")
    stored = "" if config.strategy.quantization == "none" else f", stored as {config.strategy.quantization}"
    epochs = args.max_steps / math.ceil(known.units / config.train.global_batch_size)
    unit = "packs" if known.packing else "rows"
    shared = config.strategy.sequence_parallel
    batch = config.train.global_batch_size
    held = min(batch, known.units)  # of a step; an epoch may be less than a batch
    rows_a_step = f" in {held * train.rows // known.units:,} rows" if known.packing else ""
    table = {
        "model": f"{config.model.name_or_path} ({_count(parameters.total)} parameters, {dtype}{stored})",
        "trainable": f"{parameters.trainable:,} parameters = {share:.2%}"
        f" (r {config.lora.r}, alpha {config.lora.lora_alpha}, {_names(config.lora.target_modules)}),"
        f" an adapter of {parameters.trainable * 4 / 1e6:.1f} MB",
        "data": f"{_sources(config.data.train)}: {_side(train)}",
        "processes": f"{world_size} x {device}, {_spread(spread)}",
        "global batch": f"{batch} {unit} = {world_size} process{'es' * (world_size > 1)}"
        f"{f' / {shared} a sequence' * (shared > 1)}"
        f" x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated,"
        f" about {held * train.tokens // known.units:,} tokens{rows_a_step} a step",
        "steps": f"{args.max_steps:,} ({epochs:.2f} epochs), warm-up {args.get_warmup_steps(args.max_steps)},"
        f" {config.train.lr_scheduler_type} from {config.train.learning_rate:g}",
    }
    if "eval" in known.data:
        rows, when = _side(known.data["eval"]), _when(args.eval_strategy, args.eval_steps)
        taken = f"{config.data.eval_fraction:.0%} of the rows" if config.data.eval_fraction else ""
        table["evaluation"] = f"{taken or _sources(config.data.eval)}: {rows}, {when}"
    if known.packing:
        fill = train.tokens / (train.packs * config.data.max_length)
        table["packing"] = (
            f"{train.packs:,} packs of at most {config.data.max_length:,} tokens, {fill:.2%} full"
        )
    table["checkpoints"] = (
        "none"
        if config.train.save_strategy == "no"
        else f"about {known.checkpoint_bytes / 1e6:.0f} MB"
        f" {_when(args.save_strategy, config.train.save_steps)},"
        f" {config.train.save_total_limit or 'all'} kept"
    )
    return table


def warnings(
    config: Config, known: Facts, args: TrainingArguments, untrained: list[str], *, tied: bool
) -> list[str]:
    """Return what a careful colleague would mention. untrained: turn tokens the base model never learnt."""
    lines = list(known.notes)
    if known.units < config.train.global_batch_size:
        unit = "packs" if known.packing else "rows"
        lines.append(
            f"all rows make {known.units} {unit}, fewer than"
            f" train.global_batch_size={config.train.global_batch_size}: every step is a whole epoch; lower"
            " it"
        )
    if (warm_up := args.get_warmup_steps(args.max_steps)) >= args.max_steps:
        lines.append(
            f"the learning rate is still warming up ({warm_up} steps) when training ends after"
            f" {args.max_steps}; lower train.warmup_steps"
        )
    if config.strategy.offload != "none" and not torch.cuda.is_available():
        offload = f"strategy.offload={config.strategy.offload}"
        lines.append(f"{offload} changes nothing here: without a GPU, all is in host memory")
    if config.data.eval == "example" and config.data.train != "example":
        lines.append("data.eval is still the example's; set data.eval to rows of yours, or to null")
    saved = config.lora.modules_to_save or []
    if untrained and config.model.name_or_path != TINY and not any(name in EMBEDDINGS for name in saved):
        modules = "[embed_tokens]" if tied else "[embed_tokens, lm_head]"
        lines.append(
            f"this base model never learnt {' and '.join(untrained)}, which LoRA alone can hardly teach it:"
            f" set lora.modules_to_save: {modules}, or start from the -Instruct model"
        )
    return lines


def _spread(spread: Spread) -> str:
    if spread.why:
        return spread.why.removeprefix("strategy.name=auto: ")
    return spread.said


def _side(counts: SideCounts) -> str:
    return (
        f"{counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens / counts.tokens:.0%} of them"
        f" trained, the longest row {counts.longest:,}"
    )


def _when(strategy: Any, steps: float | None) -> str:
    name = str(getattr(strategy, "value", strategy))
    return {"epoch": "every epoch", "no": "never", "steps": f"every {int(steps or 0)} steps"}[name]


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,}"


def _sources(named: Any) -> str:
    entries = named if isinstance(named, list) else [named]
    return " + ".join(
        entry
        if isinstance(entry, str)
        else entry.path + (f" x {entry.weight:g}" if entry.weight != 1 else "")
        for entry in entries
    )


def _names(modules: str | list[str]) -> str:
    return modules if isinstance(modules, str) else "/".join(modules)
