"""What every rank runs, in order.

`torchrun --nproc-per-node 2 -m qwenlora.trainer.main configs/tiny.yaml lora.r=32`, or by the agent, which has then
made the run folder and prepared the data already.
"""

import json
import logging
import os
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

from qwenlora.configs import Config, load_config
from qwenlora.data import prepared
from qwenlora.jobs.orphans import die_with_parent
from qwenlora.jobs.run import EXIT_CODES, Reason, RunFolder, write_atomically
from qwenlora.trainer import checkpoints, derived
from qwenlora.trainer import model as models
from qwenlora.trainer.metrics import Metrics
from qwenlora.trainer.prepare import prepare, read_facts
from qwenlora.trainer.progress import ProgressCallback, facts_table, take_screen
from qwenlora.trainer.stop import StopCallback
from qwenlora.trainer.training import LoraTrainer, order_of, training_arguments
from qwenlora.trainer.wandb_run import WandbCallback, mode_of

log = logging.getLogger("qwenlora")


class Rank(NamedTuple):
    """This process among the others, as torchrun says (alone, when it says nothing)."""

    rank: int
    world_size: int
    attempt: int

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def train(config: Config, run: RunFolder, rank: Rank, console: Console, resume: str) -> tuple[Reason, dict[str, int]]:
    """Train one attempt; return why it ended and {first_step, last_step}."""
    facts = read_facts(run)
    folder = run.prepared / facts.data_folder
    train_side, eval_side = prepared.open_side(folder, "train"), prepared.open_side(folder, "eval")
    assert train_side is not None, "prepare() wrote no training rows"
    checkpoint, passed_over = checkpoints.choose(run, resume)

    # the same adapter to begin with on every rank; each rank's own dropout after that
    torch.manual_seed(config.train.seed)
    tokenizer = models.load_tokenizer(config, facts.base)
    base = models.load_base(config, facts.base)
    untrained = models.untrained_turn_tokens(base, tokenizer)
    model = models.add_lora(base, config.lora)
    torch.manual_seed(config.train.seed + rank.rank)

    stop = StopCallback()
    trainer = LoraTrainer(
        model,
        training_arguments(config, run, len(train_side), rank.world_size, evaluates=eval_side is not None),
        order_of(config, train_side),
        train_side,
        eval_side,
        config.train.save_total_limit,
        processing_class=tokenizer,
        callbacks=[stop],
    )
    trainer.add_callback(Metrics(run.metrics, trainer, facts.parameters, config.train.gradient_checkpointing))
    progress, wandb = ProgressCallback(console), None
    if rank.first:
        mode, why = mode_of(config)
        where = f"off ({why})"
        if mode != "off":
            wandb = WandbCallback(config, run, mode, warn=lambda line: _warn(console, line))
            where = wandb.start()
            trainer.add_callback(wandb)
        trainer.add_callback(progress)
        console.print(
            facts_table(
                f"\n{run.path.name}", derived.facts(config, facts, trainer.args, rank.world_size) | {"W&B": where}
            )
        )
        for line in passed_over:
            _warn(console, f"passed over: {line}")
        for line in derived.warnings(config, facts, untrained, trainer.args.max_steps, tied=_tied(base)):
            _warn(console, line)
        if checkpoint:
            console.print(f"resuming from {checkpoint.name}", highlight=False)

    stop.listen()
    exit_code = 1
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        exit_code = 0
    finally:
        progress.stop()
        if wandb:
            wandb.finish(exit_code)
    first = int(checkpoint.name.split("-")[1]) + 1 if checkpoint else 1
    steps = {"first_step": first, "last_step": trainer.state.global_step}
    if stop.stopped:
        return "stopped", steps
    if rank.first:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run)
    return "done", steps


def save_adapter(model: Any, tokenizer: Any, run: RunFolder) -> None:
    """Write the final adapter and its tokenizer, whole or not at all."""
    staging = run.path / ".adapter.staging"
    # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are saved in any case
    model.save_pretrained(staging, save_embedding_layers=False)
    tokenizer.save_pretrained(staging)
    old = run.path / ".adapter.old"
    if run.adapter.exists():
        run.adapter.rename(old)
    staging.rename(run.adapter)
    checkpoints.remove(old)


def _tied(base: Any) -> bool:
    return bool(getattr(base.config, "tie_word_embeddings", False))


def _warn(console: Console, line: str) -> None:
    log.warning(line)
    console.print(f"[yellow]warning:[/] {line}", highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Run this rank: CONFIG [key=value ...]. Return the process's exit code."""
    config = load_config(arguments[0], arguments[1:])
    run = RunFolder(config.run_dir)
    world_size, number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    by_agent = "QWENLORA_ATTEMPT" in os.environ
    if by_agent:
        die_with_parent()
    attempt = int(os.environ.get("QWENLORA_ATTEMPT", "0"))
    if not by_agent and number == 0:
        run.open(config)
        attempt = run.begin_attempt(world_size)
        prepare(config, run)
    if world_size > 1:
        _join(config)
    rank = Rank(number, world_size, attempt or len(run.history()))

    console = take_screen(run.rank_log(rank.attempt, number), speaks=rank.first)
    try:
        reason, steps = train(config, run, rank, console, os.environ.get("QWENLORA_RESUME", "auto"))
        if rank.first:
            run.end_attempt(reason, steps=steps)
        console.print(_last_words(reason, steps, run), highlight=False, soft_wrap=True)
        code = EXIT_CODES[reason]
    except Exception as error:
        log.exception("rank %d failed", number)
        code = 2 if isinstance(error, ValueError) else 1
        message = _one_line(error)
        record = json.dumps({"time": time.time(), "message": message, "code": code}, ensure_ascii=False)
        write_atomically(run.rank_error(rank.attempt, number), record)
        if not by_agent:  # else the agent, which sees all ranks, says which one failed first
            if rank.first:
                run.end_attempt("refused" if code == 2 else "failed", message)
            console.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
    if dist.is_initialized() and code in (0, 75):
        dist.destroy_process_group()
    return code


def _last_words(reason: Reason, steps: dict[str, int], run: RunFolder) -> str:
    if reason == "stopped":
        return f"stopped after step {steps['last_step']}, which is saved; the same command resumes"
    return f"done: the adapter is in {os.path.relpath(run.adapter)}"


def _join(config: Config) -> None:
    """Wait for all ranks; the first one may be preparing data until then."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=config.launch.ddp_timeout_s))
    dist.barrier()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
