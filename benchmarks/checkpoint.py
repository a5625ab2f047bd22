"""python benchmarks/checkpoint.py: what a save costs a step, what it writes, and what a resume consists of.

Saves: three trainers take turns on the same rows (in the background, waiting for the disk, transformers'
own); losses must be equal and gradients not zero before a number is shown. Resumes: a process of its own for
each, at steps 10, 1,000 and 100,000 of one epoch, with a history of as many lines. What the numbers mean:
README.md beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from qwenlora.configs.schema import Config, Data, Lora, Model, Train
from qwenlora.data.prepared import Side
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Identity
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model.tiny import build_tiny
from qwenlora.trainer.record.metrics import MetricsFile

IMPORTED_S = time.time() - psutil.Process().create_time()
SAVE_EVERY, SAVE_STEPS = 5, 30
RESUMED = (10, 1_000, 100_000)
BATCH, LENGTH = 4, 32


class TheirSave(LoraTrainer):
    """Our steps, transformers' checkpoints."""

    _save_checkpoint = Trainer._save_checkpoint


def rows(count: int) -> Side:
    """Return rows of random tokens."""
    random = np.random.RandomState(0)
    ids = random.randint(300, 2000, count * LENGTH).astype(np.int32)
    starts = np.arange(count, dtype=np.int64) * LENGTH
    lengths = np.full(count, LENGTH, np.int32)
    trained = np.ones(count * LENGTH, np.bool_)
    trained[starts] = False
    numbers = np.arange(count, dtype=np.int32)
    return Side(ids, trained, starts, lengths, lengths - 1, numbers, np.zeros((count, 3), np.int32))


def config_of(r: int, steps: int) -> Config:
    """Return the config of all runs here."""
    train = Train(
        global_batch_size=BATCH,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-3,
        warmup_steps=0.0,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        eval_strategy="no",
    )
    return Config(
        run_dir="unused",
        model=Model(name_or_path="tiny"),
        data=Data(train="unused"),
        lora=Lora(r=r),
        train=train,
    )


def trainer_of(
    kind: type[LoraTrainer], base: Path, folder: Path, config: Config, side: Side, in_background: bool
) -> Any:
    """Return a trainer with a new adapter, the same each time."""
    torch.manual_seed(0)
    lora = LoraConfig(r=config.lora.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    tokenizer, run = AutoTokenizer.from_pretrained(base), RunFolder(folder)
    arguments = training_arguments(config, run, len(side), 1, evaluates=False)
    arguments.save_total_limit = 2  # transformers' own rotation
    saver = Saver(
        run, Identity(config={}, data="", base=""), 1, limit=2, in_background=in_background, timeout_s=600
    )
    with tempfile.TemporaryDirectory() as constant:
        model.peft_config["default"].save_pretrained(constant)
        tokenizer.save_pretrained(constant)
        saver.constant({file.name: file.read_bytes() for file in Path(constant).iterdir()})
    rows = Rows(order_of(config, side), side)
    return kind(model, config, arguments, rows, Services(saver), processing_class=tokenizer)


class Clock(TrainerCallback):
    """Times each step and each save."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[float] = []
        self.stalls: list[float] = []
        save = trainer._save_checkpoint

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            save(*arguments)
            self.stalls.append(time.perf_counter() - start)

        trainer._save_checkpoint = timed

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.steps.append(time.perf_counter() - self.start)


def saves(base: Path, folder: Path, r: int, repeats: int) -> dict[str, Any]:
    """Return the figures of saving."""
    side, config = rows(BATCH * SAVE_STEPS), config_of(r, SAVE_STEPS)
    kinds = {"async": (LoraTrainer, True), "sync": (LoraTrainer, False), "transformers": (TheirSave, False)}
    found: dict[str, Any] = {name: {"stalls": [], "steps": []} for name in kinds}
    losses = {}
    for _ in range(repeats):
        for name, (kind, in_background) in kinds.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            trainer = trainer_of(kind, base, folder, config, side, in_background)
            trainer.add_callback(clock := Clock(trainer))
            trainer.train()
            trainer.saver.wait()
            logs = [log for log in trainer.state.log_history if "grad_norm" in log]
            assert all(log["grad_norm"] > 0 for log in logs), "nothing was trained"
            losses[name] = [log["loss"] for log in logs]
            last = RunFolder(folder).checkpoint(SAVE_STEPS)
            assert kind is TheirSave or checkpoints.flaw(last) == "", "the checkpoint is not whole"
            found[name]["bytes"] = sum(file.stat().st_size for file in last.iterdir())
            found[name]["stalls"] += clock.stalls[1:]  # the first makes the buffers, once a run
            found[name]["steps"] += clock.steps[1:]
            found[name]["first_stall"] = clock.stalls[0]
    assert len({tuple(values) for values in losses.values()}) == 1, f"losses differ: {losses}"
    return {
        name: {
            "step_s": median(values["steps"]),
            "stall_s": median(values["stalls"]),
            "worst_stall_s": max(values["stalls"]),
            "first_stall_s": values["first_stall"],
            "bytes": values["bytes"],
        }
        for name, values in found.items()
    }


def make_checkpoint(base: Path, folder: Path, r: int, side: Side, step: int) -> None:
    """Write the run folder of a run that is at a step: its checkpoint, and a history of as many lines."""
    folder.mkdir()
    trainer = trainer_of(LoraTrainer, base, folder, config_of(r, 2), side, False)
    trainer.train()
    trainer.state.global_step, trainer.lr_scheduler.last_epoch = step, step
    shutil.rmtree(RunFolder(folder).checkpoint(2))
    trainer._save_checkpoint(trainer.model, None)
    line = (
        '{{"step": {0}, "loss": 1.234567, "grad_norm": 1.0, "learning_rate": 0.001, "time": 1795353016.46}}\n'
    )
    RunFolder(folder).metrics.write_text("".join(line.format(number) for number in range(1, step + 4)))


def resume(base: Path, folder: Path, r: int, units: int) -> dict[str, float]:
    """Go on from the newest checkpoint for a step; return where the seconds went."""
    side, run, marks = rows(units), RunFolder(folder), [("", time.perf_counter())]
    newest = run.checkpoints()[0]
    step = int(newest.name.split("-")[1])
    chosen = checkpoints.flaw(newest)
    assert chosen == "", chosen
    marks.append(("verify every byte", time.perf_counter()))
    trainer = trainer_of(LoraTrainer, base, folder, config_of(r, step + 1), side, False)
    marks.append(("model and adapter", time.perf_counter()))
    trainer.load(newest)
    marks.append(("load the adapter", time.perf_counter()))
    MetricsFile(run.metrics).forget_after(step)
    marks.append(("cut the history", time.perf_counter()))

    class Mark(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(("load the optimizer", time.perf_counter()))

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(("pass over the data", time.perf_counter()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(("first step", time.perf_counter()))

    trainer.args.save_strategy = "no"
    trainer.add_callback(Mark())
    trainer.train(resume_from_checkpoint=str(newest))
    assert trainer.state.global_step == step + 1, "it did not go on"
    parts = {name: now - before for (_, before), (name, now) in pairwise(marks)}
    return {"start and import": IMPORTED_S} | parts


def resumes(base: Path, folder: Path, r: int, repeats: int) -> dict[int, dict[str, float]]:
    """Return the parts of a resume at each step, medians over repeats."""
    units = BATCH * (max(RESUMED) + 10)
    side = rows(units)
    for step in RESUMED:
        make_checkpoint(base, folder / str(step), r, side, step)
    found: dict[int, list[dict[str, float]]] = {step: [] for step in RESUMED}
    for _ in range(repeats):
        for step in RESUMED:
            argv = [
                sys.executable,
                __file__,
                "--resume",
                str(folder / str(step)),
                "--base",
                str(base),
                "--r",
                str(r),
            ]
            answer = subprocess.run(
                [*argv, "--units", str(units)], stdout=subprocess.PIPE, check=True, text=True
            )
            found[step].append(json.loads(answer.stdout.splitlines()[-1]))
    return {
        step: {name: median(one[name] for one in ones) for name in ones[0]} for step, ones in found.items()
    }


def show(saved: dict[str, Any], resumed: dict[int, dict[str, float]], console: Console) -> None:
    """Print both tables."""
    table = Table("save", "stall, ms", "of a step", "worst, ms", "first, ms", "MB written")
    for name, values in saved.items():
        share = values["stall_s"] / values["step_s"]
        stalls = [f"{values[key] * 1e3:.1f}" for key in ("stall_s", "worst_stall_s", "first_stall_s")]
        table.add_row(name, stalls[0], f"{share:.0%}", *stalls[1:], f"{values['bytes'] / 1e6:.2f}")
    console.print(f"median step {saved['async']['step_s'] * 1e3:.1f} ms", table)
    table = Table("resume, s", *(f"step {step:,}" for step in resumed))
    for name in next(iter(resumed.values())):
        table.add_row(name, *(f"{values[name]:.3f}" for values in resumed.values()))
    table.add_row("all", *(f"{sum(values.values()):.3f}" for values in resumed.values()))
    console.print(table)


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--r", type=int, default=256, help="LoRA rank: 256 makes a state of 60 MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where runs are written; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="where the figures go")
    for name in ("--resume", "--base"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--units", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resume:
        print(json.dumps(resume(options.base, options.resume, options.r, options.units)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base"
        build_tiny(base)
        saved = saves(base, Path(folder) / "saves", options.r, options.repeats)
        resumed = resumes(base, Path(folder), options.r, options.repeats)
    show(saved, resumed, Console())
    if options.json:
        options.json.write_text(json.dumps({"saves": saved, "resumes": resumed}, indent=1))


if __name__ == "__main__":
    main()
