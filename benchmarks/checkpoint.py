"""python benchmarks/checkpoint.py: what a save costs a step, what it writes, and where a resume's time goes.

Saves: three trainers take turns on the same rows (in the background, waiting for the disk, transformers'
own); their losses must be equal and their gradients not zero, else no number is shown. Resumes: each in a
process of its own, at steps 10, 1,000 and 100,000 of one epoch, with a history of as many lines. README.md
beside this file explains the numbers.
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
from typing import Any, NamedTuple

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


class TransformersSave(LoraTrainer):
    """Our steps with transformers' checkpoints."""

    _save_checkpoint = Trainer._save_checkpoint


class SaveFigures(NamedTuple):
    """What the saves of a way cost, in seconds and bytes. first_stall_s: the one that makes the buffers."""

    step_s: float
    stall_s: float
    worst_stall_s: float
    first_stall_s: float
    bytes: int


class SavingRun(NamedTuple):
    """One run: its losses, its seconds in each step and each save, and the bytes of its last checkpoint."""

    losses: list[float]
    steps: list[float]
    stalls: list[float]
    bytes: int


def random_rows(count: int) -> Side:
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
    """Return the config of all runs."""
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


def measure_saves(base: Path, folder: Path, r: int, repeats: int) -> dict[str, SaveFigures]:
    """Return the figures of each way to save."""
    side, config = random_rows(BATCH * SAVE_STEPS), config_of(r, SAVE_STEPS)
    ways = {
        "async": (LoraTrainer, True),
        "sync": (LoraTrainer, False),
        "transformers": (TransformersSave, False),
    }
    runs: dict[str, list[SavingRun]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (kind, in_background) in ways.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            trainer = trainer_of(kind, base, folder, config, side, in_background)
            runs[name].append(saving_run(trainer, folder))
    losses = {name: turns[0].losses for name, turns in runs.items()}
    assert all(run.losses == losses["async"] for turns in runs.values() for run in turns), losses
    return {name: figures_of(turns) for name, turns in runs.items()}


def saving_run(trainer: Any, folder: Path) -> SavingRun:
    """Train with saves, and check that something was trained and saved."""
    trainer.add_callback(clock := Clock(trainer))
    trainer.train()
    trainer.saver.wait()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert all(log["grad_norm"] > 0 for log in logs), "nothing was trained"
    last = RunFolder(folder).checkpoint(SAVE_STEPS)
    if not isinstance(trainer, TransformersSave):
        assert checkpoints.flaw(last) == "", "the checkpoint is not whole"
    size = sum(file.stat().st_size for file in last.iterdir())
    return SavingRun([log["loss"] for log in logs], clock.steps, clock.stalls, size)


def figures_of(turns: list[SavingRun]) -> SaveFigures:
    """Return medians over all steps and saves, but for each run's first."""
    stalls = [seconds for run in turns for seconds in run.stalls[1:]]
    steps = [seconds for run in turns for seconds in run.steps[1:]]
    return SaveFigures(median(steps), median(stalls), max(stalls), turns[-1].stalls[0], turns[-1].bytes)


def make_checkpoint(base: Path, folder: Path, r: int, side: Side, step: int) -> None:
    """Write the run folder of a run at a step: its checkpoint, and a history of as many lines."""
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


def timed_resume(base: Path, folder: Path, r: int, units: int) -> dict[str, float]:
    """Resume from the newest checkpoint and train one step; return the seconds of each part."""
    side, run, marks = random_rows(units), RunFolder(folder), [("", time.perf_counter())]
    newest = run.checkpoints()[0]
    step = int(newest.name.split("-")[1])
    flaw = checkpoints.flaw(newest)
    assert flaw == "", flaw
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
    assert trainer.state.global_step == step + 1, "no step was trained"
    parts = {name: now - before for (_, before), (name, now) in pairwise(marks)}
    return {"start and import": IMPORTED_S} | parts


def measure_resumes(base: Path, folder: Path, r: int, repeats: int) -> dict[int, dict[str, float]]:
    """Return the parts of a resume at each step, medians over repeats."""
    units = BATCH * (max(RESUMED) + 10)
    side = random_rows(units)
    for step in RESUMED:
        make_checkpoint(base, folder / str(step), r, side, step)
    parts: dict[int, list[dict[str, float]]] = {step: [] for step in RESUMED}
    for _ in range(repeats):
        for step in RESUMED:
            argv = [sys.executable, __file__, "--resume", str(folder / str(step)), "--base", str(base)]
            argv += ["--r", str(r), "--units", str(units)]
            done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True)
            parts[step].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        step: {name: median(turn[name] for turn in turns) for name in turns[0]}
        for step, turns in parts.items()
    }


def print_tables(
    saves: dict[str, SaveFigures], resumed: dict[int, dict[str, float]], console: Console
) -> None:
    """Print what saves and resumes cost."""
    table = Table("save", "stall, ms", "of a step", "worst, ms", "first, ms", "MB written")
    for name, save in saves.items():
        seconds = (save.stall_s, save.worst_stall_s, save.first_stall_s)
        stall, worst, first = (f"{value * 1e3:.1f}" for value in seconds)
        table.add_row(
            name, stall, f"{save.stall_s / save.step_s:.0%}", worst, first, f"{save.bytes / 1e6:.2f}"
        )
    console.print(f"median step {saves['async'].step_s * 1e3:.1f} ms", table)
    table = Table("resume, s", *(f"step {step:,}" for step in resumed))
    for name in next(iter(resumed.values())):
        table.add_row(name, *(f"{values[name]:.3f}" for values in resumed.values()))
    table.add_row("all", *(f"{sum(values.values()):.3f}" for values in resumed.values()))
    console.print(table)


def main() -> None:
    """Measure saves and resumes, or be one of the resumed processes."""
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
        print(json.dumps(timed_resume(options.base, options.resume, options.r, options.units)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base"
        build_tiny(base)
        saves = measure_saves(base, Path(folder) / "saves", options.r, options.repeats)
        resumed = measure_resumes(base, Path(folder), options.r, options.repeats)
    print_tables(saves, resumed, Console())
    if options.json:
        options.json.write_text(
            json.dumps(
                {"saves": {name: save._asdict() for name, save in saves.items()}, "resumes": resumed},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
