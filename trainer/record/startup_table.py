"""The start-up table: what a config means for this run in counts, sizes and times; and warnings about it."""

import math
from typing import Any

import torch
from rich.table import Table
from transformers import TrainingArguments

from qwenlora.configs import Config
from qwenlora.data.order import idle_share
from qwenlora.data.turns import TURN_END
from qwenlora.plan.kinds import OTHER
from qwenlora.run.format import and_more
from qwenlora.run.records import Facts, Parameters, SideCounts
from qwenlora.trainer.model.base import TINY
from qwenlora.trainer.model.loading import pick_dtype
from qwenlora.trainer.model.lora import EMBEDDINGS
from qwenlora.trainer.spread.strategy import Spread

MOST_TOKENS = 16  # that a warning suggests to train one by one


def table(title: str, rows: dict[str, str]) -> Table:
    """Return a table of two columns. rows: {name: value}."""
    shown = Table(
        title=title, title_justify="left", show_header=False, box=None, pad_edge=False, title_style="bold"
    )
    shown.add_column(style="cyan", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def rows(
    config: Config, facts: Facts, args: TrainingArguments, world_size: int, spread: Spread
) -> dict[str, str]:
    """Return the start-up table's rows, {name: value}."""
    train = facts.data["train"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shown = {
        "model": _model(config, facts),
        "trainable": _trainable(config, facts),
        "of which": _of_which(facts.parameters),
        "data": f"{_sources(config.data.train)}: {_counts(train)}",
        "processes": f"{world_size} x {device}, {_strategy(spread)}{_experts(config)}",
        "recomputed": _recomputed(config, facts, spread),
        "global batch": _global_batch(config, facts, args, world_size),
        "micro-batch": f"{args.per_device_train_batch_size} {_unit(facts)}, {spread.why_so_many}"
        * bool(spread.why_so_many),
        "steps": _steps(config, facts, args),
    }
    if "eval" in facts.data:
        fraction = config.data.eval_fraction
        source = f"{fraction:.0%} of the rows" if fraction else _sources(config.data.eval)
        when = _when(args.eval_strategy, args.eval_steps)
        shown["evaluation"] = f"{source}: {_counts(facts.data['eval'])}, {when}"
    if facts.packing:
        fill = train.tokens / (train.packs * config.data.max_length)
        shown["packing"] = (
            f"{train.packs:,} packs of at most {config.data.max_length:,} tokens, {fill:.2%} full"
        )
    shown |= {"checkpoints": _checkpoints(config, facts, args)}
    return {name: value for name, value in shown.items() if value}


def _model(config: Config, facts: Facts) -> str:
    dtype = str(pick_dtype(config.model.dtype)).removeprefix("torch.")
    quantization = config.strategy.quantization
    what = "all but its experts " if facts.parameters.experts and quantization == "int8" else ""
    stored = "" if quantization == "none" else f", {what}stored as {quantization}"
    total, active = facts.parameters.total, facts.parameters.active
    of_a_token = f", of which a token meets {_rounded(active)}" if 0 < active < total else ""
    return f"{config.model.name_or_path} ({_rounded(total)} parameters{of_a_token}, {dtype}{stored})"


def _trainable(config: Config, facts: Facts) -> str:
    trainable, lora = facts.parameters.trainable, config.lora
    share = trainable / (facts.parameters.total + trainable)
    modules = lora.target_modules
    names = modules if isinstance(modules, str) else "/".join(modules)
    return (
        f"{trainable:,} parameters = {share:.2%} (r {lora.r}, alpha {lora.lora_alpha}, {names}), an adapter"
        f" of {4 * (trainable + facts.parameters.begun) / 1e6:.1f} MB"
    )


def _of_which(parameters: Parameters) -> str:
    """Return what is trained of each kind of layers, and which kinds stay frozen; empty if not known."""
    kinds = parameters.kinds
    trained = []
    for kind, of in kinds.items():
        if of.trained:
            some = f"{of.adapted:,} of " if 0 < of.adapted < of.matrices else ""
            matrices = f" ({some}{of.matrices:,} matrices)" if of.matrices > 1 else ""
            trained.append(f"{kind} {of.trained:,}{matrices}")
    frozen = [kind for kind, of in kinds.items() if of.total and not of.trained and kind != OTHER]
    return ", ".join(trained) + f"; frozen: {', '.join(frozen)}" * bool(frozen)


def _global_batch(config: Config, facts: Facts, args: TrainingArguments, world_size: int) -> str:
    batch, train = config.train.global_batch_size, facts.data["train"]
    shared = config.strategy.sequence_parallel
    a_step = min(batch, facts.units)  # an epoch may be less than a batch
    in_rows = f" in {a_step * train.rows // facts.units:,} rows" if facts.packing else ""
    return (
        f"{batch} {_unit(facts)} = {world_size}"
        f" process{'es' * (world_size > 1)}{f' / {shared} a sequence' * (shared > 1)} x"
        f" {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated, about"
        f" {a_step * train.tokens // facts.units:,} tokens{in_rows} a step"
        f"{_idle(config, args, world_size)}"
    )


def _idle(config: Config, args: TrainingArguments, world_size: int) -> str:
    """Return what share of the ranks' time is idle, and with which batches none would be."""
    batch, shared = config.train.global_batch_size, config.strategy.sequence_parallel
    idle = idle_share(batch, args.per_device_train_batch_size, world_size, shared)
    if not idle:
        return ""
    at_once = args.per_device_train_batch_size * world_size // shared
    nearest = [size for size in (batch // at_once * at_once, -(-batch // at_once) * at_once) if size]
    return f"; {idle:.0%} of the processes' time is idle, none with {' or '.join(map(str, nearest))}"


def _steps(config: Config, facts: Facts, args: TrainingArguments) -> str:
    epochs = args.max_steps / math.ceil(facts.units / config.train.global_batch_size)
    return (
        f"{args.max_steps:,} ({epochs:.2f} epochs), warm-up {args.get_warmup_steps(args.max_steps)},"
        f" {config.train.lr_scheduler_type} from {config.train.learning_rate:g}"
    )


def _checkpoints(config: Config, facts: Facts, args: TrainingArguments) -> str:
    train = config.train
    if train.save_strategy == "no":
        return "none"
    when = _when(args.save_strategy, train.save_steps)
    return f"about {facts.checkpoint_bytes / 1e6:.0f} MB {when}, {train.save_total_limit or 'all'} kept"


def warnings(
    config: Config, facts: Facts, args: TrainingArguments, untrained: dict[int, str], *, tied: bool
) -> list[str]:
    """Return warnings about the config. untrained: {id: token} of the rows that the base model never learnt;
    tied: whether its embeddings are its output matrix, too."""
    lines = list(facts.notes)
    batch = config.train.global_batch_size
    if facts.units < batch:
        lines.append(
            f"all rows make {facts.units} {_unit(facts)}, fewer than train.global_batch_size={batch}: every"
            " step is a whole epoch; lower it"
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
    lora = config.lora
    whole = any(name in EMBEDDINGS for name in lora.modules_to_save or [])
    left = {
        one: token
        for one, token in untrained.items()
        if one not in lora.trained_tokens.get("embed_tokens", [])
    }
    if left and config.model.name_or_path != TINY and not whole:
        lines.append(_never_learnt(left, tied=tied))
    return lines


def _never_learnt(untrained: dict[int, str], *, tied: bool) -> str:
    tokens, ids = list(untrained.values()), list(untrained)
    key, value = "trainable_token_indices", f"{ids}" if tied else f"{{embed_tokens: {ids}, lm_head: {ids}}}"
    if len(ids) > MOST_TOKENS:
        key, value = "modules_to_save", "[embed_tokens]" if tied else "[embed_tokens, lm_head]"
    other = "start from the -Instruct model" if TURN_END in tokens else "write words that it knows"
    return (
        f"this base model never learnt {', '.join(tokens[:5]) + and_more(tokens, 5)}, which LoRA alone can"
        f" hardly teach it: set lora.{key}: {value}, or {other}"
    )


def _unit(facts: Facts) -> str:
    return "packs" if facts.packing else "rows"


def _recomputed(config: Config, facts: Facts, spread: Spread) -> str:
    if not spread.recomputed:
        return ""
    layers = facts.parameters.layers
    if config.train.gradient_checkpointing != "auto":
        why = ""
    elif spread.recomputed == layers:
        why = ", for as little memory as possible"
    else:
        why = ", the fewest that fit the GPU"
    return f"the activations of {spread.recomputed} of {layers} layers{why}"


def _strategy(spread: Spread) -> str:
    return spread.why.removeprefix("strategy.name=auto: ") or spread.description


def _experts(config: Config) -> str:
    parts = config.strategy.expert_parallel
    return f", the experts of each layer over {parts} of them" if parts > 1 else ""


def _counts(counts: SideCounts) -> str:
    return (
        f"{counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens / counts.tokens:.0%} of them"
        f" trained, the longest row {counts.longest:,}"
    )


def _when(strategy: Any, steps: float | None) -> str:
    name = str(getattr(strategy, "value", strategy))
    return {"epoch": "every epoch", "no": "never", "steps": f"every {int(steps or 0)} steps"}[name]


def _rounded(number: int) -> str:
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
