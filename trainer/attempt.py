"""One attempt at a run, on every rank: choose a checkpoint, build, announce, resume, train, finish."""

import json
import os
import shlex
from dataclasses import replace
from typing import NamedTuple

from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import Chosen
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import Heart
from qwenlora.run.records import Identity, Reason
from qwenlora.trainer.build import Parts, build, callbacks
from qwenlora.trainer.context import Context
from qwenlora.trainer.final_adapter import constant_files, save_adapter
from qwenlora.trainer.loop.state import check_alike, in_file
from qwenlora.trainer.loop.trainer import LoraTrainer
from qwenlora.trainer.model.loading import device
from qwenlora.trainer.model.precision import resolve_dtype
from qwenlora.trainer.model.row_attention import described
from qwenlora.trainer.process import Process
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.from_rank_0 import from_rank_0
from qwenlora.trainer.ranks.stop import TIME_IS_OVER, Stop
from qwenlora.trainer.record import planning, startup_table, wandb_run
from qwenlora.trainer.record.chronicle import Chronicle
from qwenlora.trainer.record.recording import Recording
from qwenlora.trainer.record.trackers import known_id


class Outcome(NamedTuple):
    """How an attempt ended. step: the run's last, 0 before any; why: the reason to stop, or empty."""

    reason: Reason
    step: int
    why: str = ""

    def last_words(self, run: RunFolder, handover: Handover) -> str:
        """Return the last lines that the user sees."""
        again = "the same command" + " without --resume and --fresh" * (handover.resume != "auto")
        clock = f": {self.why}" if self.why == TIME_IS_OVER else ""
        if self.reason == "stopped" and self.step:
            return f"stopped after step {self.step}, which is saved; {again} resumes{clock}"
        if self.reason == "stopped":
            return f"stopped before the first step; {again} starts again{clock}"
        here = shlex.quote(os.path.relpath(run.path))
        then = "".join(f"\n  qwenlora {command} {here}" for command in ("compare", "report", "chat"))
        return f"done: the adapter is in {os.path.relpath(run.adapter)}; next:{then}"


def train(process: Process, heart: Heart) -> Outcome:
    """Train one attempt, from the chosen checkpoint to the final adapter, or until it is stopped."""
    context = _choose(process, heart)
    stop = context.stop
    stop.agree(device())
    if stop.agreed:  # before the model is loaded for nothing
        return Outcome("stopped", context.step, stop.why)
    parts = build(context)
    trainer = parts.trainer
    recording = _announce(context, parts) if process.rank.first else None
    if trainer.keeper:
        trainer.keeper.constant = constant_files(parts.model, parts.tokenizer, parts.generation)
    for callback in callbacks(context, parts, recording):
        trainer.add_callback(callback)
    _resume(context, trainer, recording)
    reason: Reason = "failed"
    try:
        _train(context, trainer)
        reason = _finish(context, parts, recording)
    finally:
        if recording:
            recording.progress.stop()
        trainer.wait_for_saves()  # after a fault, too: the next attempt may resume from this save
        if recording:
            recording.close(reason)
    if recording and reason == "done":
        planning.learn(context.process.run)
    return Outcome(reason, trainer.state.global_step, stop.why if reason == "stopped" else "")


def _choose(process: Process, heart: Heart) -> Context:
    """Start the clocks, and choose the checkpoint on rank 0: a thousand ranks need not read all of it."""
    config, run, first = process.config, process.run, process.rank.first
    facts = run.read_facts()
    minutes = config.train.max_time_min
    # only rank 0 looks at the clock: one rank is enough to stop all
    left_s = minutes * 60 - run.history.seconds_since_start() if minutes is not None and first else None
    stop = Stop(process.request, left_s)
    chronicle = Chronicle(run, process.handover.prepare_s) if first else None
    identity = checkpoints.identity_of(config, facts.data_identity, facts.base_fingerprint)
    chosen = from_rank_0(lambda: _choose_on_rank_0(run, process.handover, identity))
    before = checkpoints.read_state(chosen.folder) if chosen.folder else None
    dtype, told = from_rank_0(lambda: resolve_dtype(config, before.dtype if before else None))
    if told:
        process.warn(told)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    process = replace(process, config=config)
    return Context(process, heart, facts, identity, stop, chronicle, chosen, before)


def _choose_on_rank_0(run: RunFolder, handover: Handover, identity: Identity) -> Chosen:
    checkpoints.clear_leftovers(run)
    chosen = checkpoints.choose(run, handover.resume, identity, handover.allowed)
    if chosen.folder is None and any(attempt.reason == "done" for attempt in run.history.attempts()):
        raise ValueError(
            f"run_dir={run.path} is done and has no checkpoint to go on from; start a new run from its"
            f" adapter: lora.init_from={run.adapter} and another run_dir"
        )
    return chosen


def _announce(context: Context, parts: Parts) -> Recording:
    """Start the attempt's records, and show what it will train and from where."""
    process, trainer, checkpoint = context.process, parts.trainer, context.chosen.folder
    run, facts = process.run, context.facts
    assert trainer.saver, "rank 0 saves"
    assert context.chronicle, "rank 0 records"
    trainer.saver.constant(constant_files(parts.model, parts.tokenizer, parts.generation))
    if parts.spread.deepspeed:
        write_atomically(run.deepspeed, json.dumps(parts.spread.deepspeed, indent=1))
    else:
        run.deepspeed.unlink(missing_ok=True)  # of an earlier attempt
    if checkpoint and checkpoint.parent == run.path:  # not another run's
        wandb_run.restore_id(run, checkpoint)
    recording = Recording.start(process, facts, context.chronicle)
    trainer.wandb_id = known_id(run.wandb_id)
    rows = startup_table.rows(process.config, facts, trainer.args, process.rank.world_size, parts.spread)
    rows |= {"attention": described(parts.model), "fused": str(parts.fused), **recording.trackers.places}
    process.console.print(startup_table.table(run.path.name, rows))
    notes = startup_table.warnings(process.config, facts, trainer.args, parts.untrained, tied=parts.tied)
    for line in (*_notes_on_the_start(context), *notes):
        process.warn(line)
    if checkpoint:
        process.say(f"resuming from {checkpoint.name}")
        if context.chosen.changed:
            process.say(f"changed since: {context.chosen.changed}")
    planned, send = planning.planned(process.config, facts, parts.spread), recording.trackers.send
    context.chronicle.starts(checkpoint, context.step, parts.spread.description, planned, send)
    return recording


def _notes_on_the_start(context: Context) -> list[str]:
    notes = [f"passed over: {line}" for line in context.chosen.passed_over]
    if context.process.run.trained and not context.chosen.folder:
        notes.append("no checkpoint was saved before: starting from the first step")
    return notes


def _resume(context: Context, trainer: LoraTrainer, recording: Recording | None) -> None:
    """Load the checkpoint; once all ranks have, remove the later steps from the records."""
    process, step = context.process, context.step
    if context.chosen.folder:
        trainer.load(context.chosen.folder)
        assert trainer.resumed
        before, now = trainer.resumed.cursor.steps_per_epoch, trainer.order.steps_per_epoch
        if recording and before != now:
            process.warn(
                f"an epoch had {before} steps, and has {now} now: training goes on at step {step + 1} of the"
                " new order"
            )
    context.stop.agree(trainer.args.device)
    if recording:
        for name in checkpoints.set_aside_newer(process.run, step):
            process.say(f"set aside: {name}; it is newer than the checkpoint, and nothing uses it")
        recording.go_back_to(step, evaluation_too=_evaluation_is_due(trainer))


def _evaluation_is_due(trainer: LoraTrainer) -> bool:
    """Whether the previous attempt was stopped when it should have evaluated."""
    return bool(trainer.resumed and trainer.resumed.evaluation_due)


def _train(context: Context, trainer: LoraTrainer) -> None:
    """Train the steps that are left, unless the ranks agree to stop."""
    stop, checkpoint = context.stop, context.chosen.folder
    if not stop.agreed and _evaluation_is_due(trainer):
        trainer.evaluate()
    if not stop.agreed and context.step < trainer.args.max_steps and not trainer.gave_up:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _finish(context: Context, parts: Parts, recording: Recording | None) -> Reason:
    """Wait for the last save, and after the last step write the adapter; return how the attempt ended.
    Raises: TrainingFault, on all ranks, when the attempt was stopped and its last save failed. After the last
    step that save is not needed: the adapter holds the same weights."""
    trainer = parts.trainer
    stopped = context.stop.ended_early(trainer.state.global_step, trainer.args.max_steps)
    if recording:
        recording.progress.stop()
    failure = from_rank_0(lambda: _failure_of_the_last_save(trainer))
    if stopped:
        if failure:
            raise TrainingFault(
                f"stopped, but {failure}; the same command goes on from an earlier checkpoint"
            )
        return "stopped"
    _take_the_best(context, trainer)
    with trainer.whole():
        check_alike(in_file(trainer.peft_model), trainer.args.device)
        if recording:
            save_adapter(trainer.peft_model, parts.tokenizer, parts.generation, context.process.run)
    return "done"


def _take_the_best(context: Context, trainer: LoraTrainer) -> None:
    """Say that training ended early, and put the best checkpoint's adapter into the model, if wanted."""
    process, losses = context.process, trainer.losses
    train = process.config.train
    if trainer.gave_up:
        best_step = checkpoints.best_first(losses)[0]
        process.say(
            f"ended after step {trainer.state.global_step}: {train.early_stopping_patience} evaluations"
            f" without a better {train.metric_for_best_model} than after step {best_step}"
        )
    if train.final == "last":
        return
    best = from_rank_0(lambda: checkpoints.best(process.run, losses))
    if best is None:
        process.warn("train.final=best: no evaluated checkpoint is whole; the adapter is the last step's")
        return
    if step_of(best) != trainer.state.global_step:
        trainer.restore_adapter(best)
    process.say(f"the best is {best.name}: eval_loss {losses[step_of(best)]:.4f}")


def _failure_of_the_last_save(trainer: LoraTrainer) -> str:
    if trainer.saver is None:  # a last rank that is simulated has no rank 0 to ask
        return ""
    trainer.saver.wait()
    return trainer.saver.failure
