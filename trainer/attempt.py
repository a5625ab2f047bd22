"""One attempt at a run, in order: data, model, resume, train, save. Every rank runs this; main.py calls it."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from qwenlora.configs import Config
from qwenlora.data import prepared
from qwenlora.jobs.disk import sync
from qwenlora.jobs.run import Reason, RunFolder
from qwenlora.trainer import checkpoints, derived
from qwenlora.trainer import model as models
from qwenlora.trainer.metrics import Metrics
from qwenlora.trainer.prepare import Facts, read_facts
from qwenlora.trainer.progress import ProgressCallback, facts_table
from qwenlora.trainer.screen import Rank, StopRequest
from qwenlora.trainer.stop import StopCallback
from qwenlora.trainer.training import LoraTrainer, order_of, training_arguments
from qwenlora.trainer.wandb_run import WandbCallback, mode_of

log = logging.getLogger("qwenlora")


def train(
    config: Config, run: RunFolder, rank: Rank, request: StopRequest, console: Console, resume: str
) -> tuple[Reason, dict[str, int]]:
    """Train one attempt; return why it ended and {first_step, last_step}."""
    facts = read_facts(run)
    folder = Path(facts.data_folder)
    train_side, eval_side = prepared.open_side(folder, "train"), prepared.open_side(folder, "eval")
    assert train_side is not None, "prepare() wrote no training rows"
    identity = checkpoints.identity_of(config, facts.data_identity, facts.base_fingerprint)
    checkpoint, notes = checkpoints.choose(run, resume, identity)
    notes = [f"passed over: {line}" for line in notes]
    first_step = 1
    if run.trained and not checkpoint:
        notes.append("no checkpoint was saved before: starting from the first step")
    if checkpoint:
        record = checkpoints.read(checkpoint)
        first_step = record["step"] + 1
        if record["world_size"] != rank.world_size:
            notes.append(
                f"{checkpoint.name} was saved by {record['world_size']} processes, this attempt has {rank.world_size}:"
                " the same rows in the same steps, but dropout is drawn anew"
            )

    torch.manual_seed(config.train.seed)  # the same adapter to begin with on every rank
    tokenizer = models.load_tokenizer(config, facts.base)
    base = models.load_base(config, facts.base)
    untrained = models.untrained_turn_tokens(base, tokenizer)
    model = models.add_lora(base, config.lora)
    packs = None
    if facts.packing:
        models.check_isolation(model)
        packs = prepared.open_packs(folder)

    stop, progress = StopCallback(request), ProgressCallback(console)
    trainer = LoraTrainer(
        model,
        training_arguments(config, run, facts.units, rank.world_size, evaluates=eval_side is not None),
        order_of(config, train_side, packs),
        train_side,
        eval_side,
        identity,
        config.train.save_total_limit,
        processing_class=tokenizer,
        callbacks=[stop],
    )
    torch.manual_seed(config.train.seed + rank.rank)  # each rank's own dropout from here; Trainer() has just reset it
    trainer.add_callback(Metrics(run.metrics, trainer, facts.parameters, config.train.gradient_checkpointing))
    wandb = None
    if rank.first:
        wandb, where = _start_wandb(config, run, facts, console)
        for callback in (wandb, progress):
            if callback:
                trainer.add_callback(callback)
        table = derived.facts(config, facts, trainer.args, rank.world_size) | {"W&B": where}
        console.print(facts_table(run.path.name, table))
        for line in [
            *notes,
            *derived.warnings(config, facts, trainer.args, untrained, tied=bool(base.config.tie_word_embeddings)),
        ]:
            _warn(console, line)
        if checkpoint:
            console.print(f"resuming from {checkpoint.name}")

    trainer.accelerator.wait_for_everyone()  # all have chosen their checkpoint
    if checkpoint and rank.first:
        checkpoints.set_aside_newer(run, first_step - 1)

    exit_code = 1
    try:
        if checkpoint and first_step > trainer.args.max_steps:  # all is trained, only the adapter was not written yet
            trainer.load_adapter(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        progress.stop()
        if rank.first and not stop.stopped:
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run)
        exit_code = 0
    finally:
        progress.stop()
        if wandb:
            wandb.finish(exit_code)
    last_step = max(trainer.state.global_step, first_step - 1)
    return "stopped" if stop.stopped else "done", {"first_step": first_step, "last_step": last_step}


def _start_wandb(config: Config, run: RunFolder, facts: Facts, console: Console) -> tuple[WandbCallback | None, str]:
    """Return the callback, if W&B is on, and what the start-up table says of it."""
    mode, why = mode_of(config)
    if mode == "off":
        return None, f"off ({why})"
    wandb = WandbCallback(config, run, mode, warn=lambda line: _warn(console, line))
    where = wandb.start()
    sides = {f"data/{side}_{what}": counts[what] for side, counts in facts.data.items() for what in ("rows", "tokens")}
    wandb.summarize({"data/bad_rows": facts.bad_rows, **sides})
    return wandb, where


def save_adapter(model: Any, tokenizer: Any, run: RunFolder) -> None:
    """Write the final adapter and its tokenizer, whole or not at all."""
    staging = run.path / ".adapter.staging"
    checkpoints.remove(staging)
    # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are saved in any case
    model.save_pretrained(staging, save_embedding_layers=False)
    tokenizer.save_pretrained(staging)
    (staging / "README.md").unlink(missing_ok=True)  # peft's is an empty form
    mask = os.umask(0)
    os.umask(mask)
    for file in staging.iterdir():
        file.chmod(0o666 & ~mask)  # safetensors closes its files to colleagues
        sync(file)
    old = run.path / ".adapter.old"
    checkpoints.remove(old)
    if run.adapter.exists():
        run.adapter.rename(old)
    staging.rename(run.adapter)
    sync(run.path)
    checkpoints.remove(old)


def _warn(console: Console, line: str) -> None:
    log.warning(line)
    console.print(Text("warning: ", style="yellow").append(line, style="default"), soft_wrap=True)
