"""Builds what an attempt trains with: base, adapter, strategy, trainer and its callbacks. The order of these
steps decides the numbers: they set seeds and call collectives."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwenlora.configs import Config
from qwenlora.configs.estimate import cut_into
from qwenlora.data import prepared, sources
from qwenlora.data.order import total_steps
from qwenlora.data.prepared import Side
from qwenlora.run.heartbeat import Heart
from qwenlora.run.records import Facts
from qwenlora.trainer.context import Context
from qwenlora.trainer.loop import eva, trial
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.in_memory import InMemory
from qwenlora.trainer.loop.keeper import Keeper
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.schedule import check_schedule
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model import pretrained
from qwenlora.trainer.model.checks import check_isolation, isolates_rows, untrained_tokens
from qwenlora.trainer.model.endings import Settings, generation_settings, set_end
from qwenlora.trainer.model.fused import Fused, fuse
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.model.row_attention import attend_row_by_row, attend_to_padded_rows
from qwenlora.trainer.model.row_states import keep_states_apart
from qwenlora.trainer.process import Process
from qwenlora.trainer.ranks.rendezvous import is_pretended
from qwenlora.trainer.record.metrics import Metrics
from qwenlora.trainer.record.pace import PaceCallback, Stopwatch, alone
from qwenlora.trainer.record.profile import Profiler
from qwenlora.trainer.record.recording import Recording
from qwenlora.trainer.spread import experts, sequence, strategy
from qwenlora.trainer.spread.experts import DividedExperts
from qwenlora.trainer.spread.sequence import Team
from qwenlora.trainer.spread.strategy import Spread


@dataclass(frozen=True)
class Parts:
    """The result of build(). model: the base with its adapter; untrained: tokens of the rows that the base
    never learnt; tied: whether its embeddings are its output matrix, too; generation: generation_config.json
    of the adapter."""

    trainer: LoraTrainer
    model: Any
    tokenizer: Any
    spread: Spread
    fused: Fused
    untrained: dict[int, str]
    tied: bool
    generation: Settings


def build(context: Context) -> Parts:
    """Build model and trainer; all ranks call it. Raises: ValueError when the config cannot run here."""
    config, facts = context.process.config, context.facts
    _check_length(config, facts, context.step)
    tokenizer = pretrained.load_tokenizer(config, facts.base)
    set_end(tokenizer, text_only=facts.text_only)
    generation = generation_settings(facts.base, config.model.revision, tokenizer, text_only=facts.text_only)
    before = context.before.micro_batch if context.before else 0
    spread = strategy.choose(config, facts.parameters, facts.longest, before)
    base = strategy.load_base(config, facts.base, spread)
    row_by_row = attend_row_by_row(base, states_apart=keep_states_apart(base))
    untrained = untrained_tokens(base, tokenizer, prepared.used_tokens(Path(facts.data_folder), "train"))
    torch.manual_seed(config.train.seed)  # a new adapter is the same on all ranks, under any strategy
    model = add_lora(base, config.lora, config.model.revision, context.chosen.folder, context.heart.beat)
    if config.lora.init_lora_weights == "eva" and not context.chosen.folder:
        _begin_by_rows(context, model)
    fused = fuse(model, sharded_by_deepspeed=spread.name == "zero3")
    divided = experts.divide(model, config)
    context.heart.beat(context.step)
    team = sequence.team_of(config.strategy.sequence_parallel, config.launch.ddp_timeout_s)
    trainer = _trainer(context, model, tokenizer, spread, team, divided)
    if torch.cuda.is_available():  # on a CPU a process that takes too much is killed, and cannot try less
        spread = trial.try_out(trainer, config, spread, facts.parameters.layers)
    trainer.make_engine()
    # before attention is shared: the kernel, which this checks, sees whole packs in either case
    if facts.packing:
        check_isolation(model)
    elif row_by_row and not isolates_rows(model):
        attend_to_padded_rows(base)
        trainer.end_to_end = False
    sequence.share_attention(base, team)
    _beat_in_each_forward(model, context.heart, trainer)
    tied = bool(base.config.tie_word_embeddings)
    return Parts(trainer, model, tokenizer, spread, fused, untrained, tied, generation)


def _begin_by_rows(context: Context, model: Any) -> None:
    config, folder = context.process.config, Path(context.facts.data_folder)
    side = prepared.open_side(folder, "train")
    assert side is not None, "prepare() wrote no training rows"
    packs = prepared.open_packs(folder) if context.facts.packing else None
    eva.begin(model, config, order_of(config, side, packs), side, lambda: context.heart.beat(context.step))


def callbacks(context: Context, parts: Parts, recording: Recording | None) -> list[TrainerCallback]:
    """Return the callbacks that record the attempt, in their order. recording: None except on rank 0."""
    process, trainer = context.process, parts.trainer
    metrics = Metrics(
        recording.metrics if recording else None,
        trainer,
        context.facts.parameters.work,
        process.run.history.progress if recording else None,
        process.attempt,
    )
    # before Metrics, which writes what it adds; on all ranks, since they compare
    paces = _paces(process, parts, recording)
    keeps = [InMemory(trainer, process.config.checkpoint.memory_steps)] if process.handover.memory else []
    if not recording:
        return [*paces, metrics, *keeps]
    # chronicle before Metrics: a reader who sees an attempt's first step in progress.json must find that
    # attempt in attempts.jsonl; Metrics before the others: it completes the logs that they send and show
    steps = process.config.log.profile_steps
    profiler = Profiler(steps, process, trainer) if steps else None
    ordered = [recording.chronicle, *paces, metrics, profiler, recording.trackers, recording.progress]
    return [*(callback for callback in ordered if callback), *keeps]


def _paces(process: Process, parts: Parts, recording: Recording | None) -> list[PaceCallback]:
    """Return what compares the ranks' paces, where there are several that work by themselves for a time."""
    trainer = parts.trainer
    if process.rank.world_size == 1 or is_pretended():  # one alone may have a process group, too
        return []
    cut, divided = trainer.team.size > 1, trainer.experts is not None
    modules = alone(parts.model, parts.spread.name, cut=cut, divided=divided)
    stopwatch = Stopwatch(modules, trainer.args.device)
    return [PaceCallback(process, stopwatch, recording.trackers if recording else None)] if modules else []


def _check_length(config: Config, facts: Facts, trained: int) -> None:
    """Refuse a run that is too short. Raises: ValueError."""
    train = config.train
    steps = total_steps(facts.units, train.global_batch_size, train.num_train_epochs, train.max_steps)
    if trained > steps:
        setting = (
            f"max_steps={train.max_steps}"
            if train.max_steps
            else f"num_train_epochs={train.num_train_epochs:g}"
        )
        raise ValueError(
            f"train.{setting} makes {steps} steps, and {trained} are trained already; raise it, or name an"
            " earlier checkpoint: --resume"
        )
    check_schedule(train, steps)


def _trainer(
    context: Context,
    model: Any,
    tokenizer: Any,
    spread: Spread,
    team: Team,
    divided: DividedExperts | None,
) -> LoraTrainer:
    process, facts = context.process, context.facts
    config, folder = cut_into(process.config, spread.micro_batch), Path(facts.data_folder)
    world_size = process.rank.world_size
    train_side, eval_side = prepared.open_side(folder, "train"), prepared.open_side(folder, "eval")
    assert train_side is not None, "prepare() wrote no training rows"
    packs = prepared.open_packs(folder) if facts.packing else None
    evaluates = eval_side is not None
    return LoraTrainer(
        model,
        config,
        training_arguments(config, process.run, facts.units, world_size, evaluates, spread.name),
        Rows(order_of(config, train_side, packs), train_side, eval_side, _place_of(config, train_side)),
        Services(
            _saver(context) if process.rank.first else None, context.stop, process.warn, _keeper(context)
        ),
        deepspeed=spread.deepspeed,
        team=team,
        experts=divided,
        processing_class=tokenizer,
    )


def _saver(context: Context) -> Saver:
    process = context.process
    return Saver(
        process.run,
        context.identity,
        process.rank.world_size,
        limit=process.config.train.save_total_limit,
        in_background=process.config.checkpoint.async_,
        timeout_s=process.config.checkpoint.timeout_s,
        warn=process.warn,
        give_up=process.give_up,
    )


def _keeper(context: Context) -> Keeper | None:
    process = context.process
    if not process.handover.memory or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    return Keeper(process.handover.memory, context.identity, process.rank.world_size, process.warn)


def _place_of(config: Config, side: Side) -> Callable[[int], str]:
    """Return a function from a training row's number to its place: file and line."""

    def place(row: int) -> str:
        source, file, line = map(int, side.places[side.row_of[row]])
        return sources.find(config.data)[source].place(file, line)

    return place


def _beat_in_each_forward(model: torch.nn.Module, heart: Heart, trainer: LoraTrainer) -> None:
    """Beat around each forward pass: a rank that hangs in it has beaten less often than those that wait."""

    def beat(*_: object) -> None:
        heart.beat(trainer.state.global_step + 1)

    model.register_forward_pre_hook(beat)
    model.register_forward_hook(beat)
