"""One attempt at a run, in order: data, model, resume, train, save. Every rank runs this; main.py calls
it."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from qwenlora.configs import Config
from qwenlora.data import prepared, sources
from qwenlora.data.order import accumulation_steps
from qwenlora.data.prepared import Side
from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import Chosen
from qwenlora.run.disk import seal, settle, sync, write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import Heart
from qwenlora.run.records import Facts, Identity, Reason
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.saver import Saver, reason_of
from qwenlora.trainer.loop.state import adapter_of, check_alike, not_finite
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model.checks import check_isolation, untrained_turn_tokens
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.screen import Rank, StopRequest
from qwenlora.trainer.ranks.stop import TIME_IS_OVER, Stop
from qwenlora.trainer.record import startup_table as derived
from qwenlora.trainer.record.chronicle import Chronicle
from qwenlora.trainer.record.metrics import Metrics, MetricsFile
from qwenlora.trainer.record.progress import ProgressCallback, facts_table
from qwenlora.trainer.record.wandb_run import WandbCallback, mode_of
from qwenlora.trainer.spread import sequence, strategy

log = logging.getLogger("qwenlora")


class Outcome(NamedTuple):
    """How an attempt ended. step: the last one of the run, 0 before any; stopped, it is saved. why: it was
    stopped."""

    reason: Reason
    step: int
    why: str = ""

    def last_words(self, run: RunFolder, handover: Handover) -> str:
        """Return what the user is told."""
        again = "the same command" + " without --resume and --fresh" * (handover.resume != "auto")
        clock = f": {self.why}" if self.why == TIME_IS_OVER else ""
        if self.reason == "stopped" and self.step:
            return f"stopped after step {self.step}, which is saved; {again} resumes{clock}"
        if self.reason == "stopped":
            return f"stopped before the first step; {again} starts again{clock}"
        return f"done: the adapter is in {os.path.relpath(run.adapter)}"


def train(
    config: Config,
    run: RunFolder,
    rank: Rank,
    request: StopRequest,
    console: Console,
    handover: Handover,
    give_up: Callable[[str], None],
    heart: Heart,
) -> Outcome:
    """Train one attempt. give_up: ends the process with a message, when a save hangs."""
    facts = run.read_facts()
    folder = Path(facts.data_folder)
    train_side, eval_side = prepared.open_side(folder, "train"), prepared.open_side(folder, "eval")
    assert train_side is not None, "prepare() wrote no training rows"
    stop = Stop(request, _seconds_left(config, run) if rank.first else None)
    chronicle = Chronicle(run, handover.prepare_s, lambda numbers: wandb.send(numbers) if wandb else None)
    identity = checkpoints.identity_of(config, facts.data_identity, facts.base_fingerprint)
    chosen = _choose(run, rank, handover, identity)
    checkpoint = chosen.folder
    step = checkpoints.read(checkpoint).step if checkpoint else 0
    if _is_asked(stop):  # before the model is loaded for nothing
        return Outcome("stopped", step, _asked(request))

    tokenizer = models.load_tokenizer(config, facts.base)
    longest = max(counts.longest for counts in facts.data.values())
    spread = strategy.choose(config, facts.parameters, _accumulation(config, rank), longest)
    base = strategy.load_base(config, facts.base, spread)
    untrained = untrained_turn_tokens(base, tokenizer)
    torch.manual_seed(
        config.train.seed
    )  # the same adapter to begin with on every rank, however the base is spread
    model = add_lora(base, config.lora, config.model.revision)
    heart.beat(step)
    packs = prepared.open_packs(folder) if facts.packing else None

    def warn(line: str) -> None:
        log.warning(line)
        console.print(Text("warning: ", style="yellow").append(line, style="default"), soft_wrap=True)

    team = sequence.team_of(config.strategy.sequence_parallel, config.launch.ddp_timeout_s)
    progress = ProgressCallback(console)
    wandb: WandbCallback | None = None
    trainer = LoraTrainer(
        model,
        config,
        training_arguments(
            config, run, facts.units, rank.world_size, evaluates=eval_side is not None, name=spread.name
        ),
        Rows(order_of(config, train_side, packs), train_side, eval_side, _place_of(config, train_side)),
        Services(
            saver=_saver(config, run, rank, identity, warn, give_up) if rank.first else None,
            stop=stop,
            warn=warn,
        ),
        deepspeed=spread.deepspeed,
        team=team,
        processing_class=tokenizer,
    )
    _refuse_fewer_steps(config, step, trainer.args.max_steps)
    trainer.make_engine()
    if facts.packing:
        # by whole packs on each rank: the kernel is asked, which sees them whole where ranks share sequences,
        # too
        check_isolation(model)
    sequence.share_attention(base, team)
    _beat_with(model, heart, trainer)
    metrics = MetricsFile(run.metrics, warn) if rank.first else None
    if (
        rank.first
    ):  # before Metrics: who reads of an attempt's first step in progress.json finds it in attempts.jsonl
        trainer.add_callback(chronicle)
    trainer.add_callback(
        Metrics(
            metrics,
            trainer,
            facts.parameters,
            config.train.gradient_checkpointing,
            run.history.progress if rank.first else None,
            chronicle.number,
        )
    )
    if rank.first:
        if trainer.saver:
            trainer.saver.constant(_constant_files(model, tokenizer))
        if spread.deepspeed:
            write_atomically(run.deepspeed, json.dumps(spread.deepspeed, indent=1))
        else:
            run.deepspeed.unlink(missing_ok=True)  # an earlier attempt's
        if checkpoint and checkpoint.parent == run.path:
            _restore_wandb_id(run, checkpoint)
        wandb, where = _start_wandb(config, run, facts, warn)
        for callback in (wandb, progress):
            if callback:
                trainer.add_callback(callback)
        trainer.wandb_id = run.wandb_id.read_text().strip() if run.wandb_id.exists() else ""
        table = derived.facts(config, facts, trainer.args, rank.world_size, spread) | {"W&B": where}
        console.print(facts_table(run.path.name, table))
        tied = bool(base.config.tie_word_embeddings)
        for line in [
            *_notes(run, chosen),
            *derived.warnings(config, facts, trainer.args, untrained, tied=tied),
        ]:
            warn(line)
        if checkpoint:
            console.print(f"resuming from {checkpoint.name}", soft_wrap=True)
            if chosen.changed:
                console.print(f"changed since: {chosen.changed}", soft_wrap=True)
        chronicle.resumed(checkpoint, step, spread.said)

    if checkpoint:
        trainer.load(checkpoint)
        assert trainer.resumed
        held, now = trainer.resumed.cursor.steps_per_epoch, trainer.order.steps_per_epoch
        if rank.first and held != now:
            warn(
                f"an epoch had {held} steps, and has {now} now: training goes on at step {step + 1} of the"
                " new order"
            )
    evaluation_due = bool(trainer.resumed and trainer.resumed.evaluation_due)
    stop.agree(trainer.args.device)  # and all have chosen and loaded their checkpoint
    if metrics:
        for name in checkpoints.set_aside_newer(run, step):
            console.print(f"set aside: {name}, which nothing uses any more", soft_wrap=True)
        metrics.forget_after(step, evaluation_too=evaluation_due)
        if wandb and (lost := run.history.first_step_of_the_killed()):
            wandb.send_again(metrics.since(lost))

    exit_code, stopped = 1, False
    try:
        if not stop.agreed and evaluation_due:
            trainer.evaluate()
        if not stop.agreed and step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stopped = stop.stopped or (stop.agreed and trainer.state.global_step < trainer.args.max_steps)
        progress.stop()
        _finish_saving(trainer, needed=stopped)
        if not stopped:
            with trainer.whole():
                check_alike(adapter_of(trainer.peft_model), trainer.args.device)
                if rank.first:
                    save_adapter(trainer.peft_model, tokenizer, run)
        exit_code = 0
    finally:
        progress.stop()
        if trainer.saver:
            trainer.saver.wait()  # after a fault, too: it may be writing what is gone on from
        if metrics:
            metrics.close()
        if wandb:
            wandb.summarize(chronicle.summary("failed" if exit_code else "stopped" if stopped else "done"))
            wandb.finish(exit_code)
    if stopped:
        return Outcome("stopped", trainer.state.global_step, _asked(request))
    return Outcome("done", trainer.args.max_steps)


def _accumulation(config: Config, rank: Rank) -> int:
    train = config.train
    return accumulation_steps(
        train.global_batch_size,
        train.per_device_train_batch_size,
        rank.world_size,
        config.strategy.sequence_parallel,
    )


def _is_asked(stop: Stop) -> bool:
    stop.agree(models.device())
    return stop.agreed


def _asked(request: StopRequest) -> str:
    return request.why or "another process was asked to"


def _beat_with(model: torch.nn.Module, heart: Heart, trainer: LoraTrainer) -> None:
    """Give a sign of life before and after each forward pass: who hangs in one has given fewer than who
    waits."""

    def beat(*_: object) -> None:
        heart.beat(trainer.state.global_step + 1)

    model.register_forward_pre_hook(beat)
    model.register_forward_hook(beat)


def _seconds_left(config: Config, run: RunFolder) -> float | None:
    minutes = config.train.max_time_min
    return None if minutes is None else minutes * 60 - run.history.seconds_since_start()


def _choose(run: RunFolder, rank: Rank, handover: Handover, identity: Identity) -> Chosen:
    """Return the checkpoint that rank 0 chooses: a thousand ranks need not read every byte of it."""
    said: list[Any] = [None]
    if rank.first:
        try:
            checkpoints.clear_leftovers(run)
            said = [checkpoints.choose(run, handover.resume, identity, handover.allowed)]
            if said[0].folder is None and any(attempt.reason == "done" for attempt in run.history.attempts()):
                raise ValueError(
                    f"run_dir={run.path} is done and has no checkpoint to go on from; start a new run from"
                    f" its adapter: lora.init_from={run.adapter} and another run_dir"
                )
        except ValueError as refusal:
            said = [refusal]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    if isinstance(said[0], ValueError):
        raise said[0]
    chosen: Chosen = said[0]
    return chosen


def _refuse_fewer_steps(config: Config, trained: int, steps: int) -> None:
    if trained > steps:
        train = config.train
        said = (
            f"max_steps={train.max_steps}"
            if train.max_steps
            else f"num_train_epochs={train.num_train_epochs:g}"
        )
        raise ValueError(
            f"train.{said} makes {steps} steps, and {trained} are trained already; raise it, or name an"
            " earlier checkpoint: --resume"
        )


def _saver(
    config: Config,
    run: RunFolder,
    rank: Rank,
    identity: Identity,
    warn: Callable[[str], None],
    give_up: Callable[[str], None],
) -> Saver:
    return Saver(
        run,
        identity,
        rank.world_size,
        limit=config.train.save_total_limit,
        in_background=config.checkpoint.async_,
        timeout_s=config.checkpoint.timeout_s,
        warn=warn,
        give_up=give_up,
    )


def _place_of(config: Config, side: Side) -> Callable[[int], str]:
    """Return what says where a training row stands."""

    def place(row: int) -> str:
        source, file, line = map(int, side.places[side.row_of[row]])
        return sources.find(config.data)[source].place(file, line)

    return place


def _notes(run: RunFolder, chosen: Chosen) -> list[str]:
    notes = [f"passed over: {line}" for line in chosen.passed_over]
    if run.trained and not chosen.folder:
        notes.append("no checkpoint was saved before: starting from the first step")
    return notes


def _restore_wandb_id(run: RunFolder, checkpoint: Path) -> None:
    """Go on in the W&B run of the checkpoint, where its folder was lost."""
    known = checkpoints.read_state(checkpoint).wandb_id
    if known and not run.wandb_id.exists():
        run.wandb_id.parent.mkdir(exist_ok=True)
        write_atomically(run.wandb_id, known)


def _start_wandb(
    config: Config, run: RunFolder, facts: Facts, warn: Callable[[str], None]
) -> tuple[WandbCallback | None, str]:
    """Return the callback, if W&B is on, and what the start-up table says of it."""
    mode, why = mode_of(config)
    if mode == "off":
        return None, f"off ({why})"
    wandb = WandbCallback(config, run, mode, warn=warn)
    where = wandb.start()
    sides = {
        f"data/{side}_{what}": getattr(counts, what)
        for side, counts in facts.data.items()
        for what in ("rows", "tokens")
    }
    wandb.summarize({"data/bad_rows": facts.bad_rows, **sides})
    return wandb, where


def _finish_saving(trainer: LoraTrainer, *, needed: bool) -> None:
    """Wait for the last save. Raises: TrainingFault, on all ranks, when it failed and is needed.

    After the last step it is not: the adapter comes.
    """
    failure = [""]
    if trainer.saver:
        trainer.saver.wait()
        failure = [trainer.saver.failure]
    if dist.is_initialized():
        dist.broadcast_object_list(failure)
    if failure[0] and needed:
        raise TrainingFault(f"stopped, but {failure[0]}; the same command goes on from an earlier checkpoint")


def _constant_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Return the files that are the same in every checkpoint: the adapter's config and the tokenizer."""
    adapter = copy.copy(model.peft_config["default"])
    adapter.inference_mode = True  # as peft's own save_pretrained says it
    with TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def save_adapter(model: Any, tokenizer: Any, run: RunFolder) -> None:
    """Write the final adapter and its tokenizer, whole or not at all. Raises: TrainingFault when it
    cannot."""
    staging = run.path / ".adapter.staging"
    if broken := not_finite(adapter_of(model)):
        raise TrainingFault(
            f"the last step made weights that are not finite ({broken}); no adapter was written"
        )
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()  # not with its parents: a run folder that is gone is not made anew
        # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are saved in any
        # case
        model.save_pretrained(staging, save_embedding_layers=False)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)  # peft's is an empty form
        seal(staging, but="adapter_config.json")  # which names the base, and that may move
        settle(staging)
        if run.comparison.exists():  # of the adapter that goes
            run.comparison.replace(run.comparison.with_suffix(".old.json"))
        old = run.path / ".adapter.old"
        shutil.rmtree(old, ignore_errors=True)
        if run.adapter.exists():
            run.adapter.rename(old)
        staging.rename(run.adapter)
        sync(run.path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingFault(
            f"all steps are trained, but the adapter was not saved: {reason_of(error)}; the same command"
            " tries again"
        ) from error
