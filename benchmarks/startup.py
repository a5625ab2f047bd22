"""python benchmarks/startup.py: from a command to the end of its first step, against plain transformers.

A Qwen2 of 42.8M parameters with a real vocabulary is made, with random weights. Then the commands take turns:
`qwenlora train` in an empty folder, plain transformers.Trainer with peft on the same base, rows, batch and
LoRA, a restart of the first (rows prepared, a checkpoint there), and two ranks. README.md beside this file
explains the numbers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
ROWS, BATCH, MAX_LENGTH = 200, 8, 512
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
COMMAND = [sys.executable, "-c", "from qwenlora.cli.main import main; main()"]
POLL_S = 0.01


class Measured(NamedTuple):
    """A command's figures. first_step_s: from its start to the end of its first step; cpu_s: of all its
    processes, to their end."""

    first_step_s: float
    cpu_s: float


def main() -> None:
    """Measure what the command line asks for."""
    options = read_options()
    if options.plain:
        plain_trainer(Path(options.plain))
        return
    turns: dict[str, list[Measured]] = defaultdict(list)
    others: dict[str, list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        make_base(folder, Path(options.tokenizer), Path(options.data))
        for _ in range(options.repeats):
            for way, figures in one_turn(folder).items():
                turns[way].append(figures)
            for way, command in commands(folder).items():
                others[way].append(Measured(*timed(command, folder)))
    show(turns, others)
    if options.json:
        figures = {way: [each._asdict() for each in all_] for way, all_ in [*turns.items(), *others.items()]}
        Path(options.json).write_text(json.dumps(figures, indent=1))


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=ASSETS / "tokenizers" / "qwen2.5", help="a Qwen's tokenizer")
    parser.add_argument("--data", default=ASSETS / "data" / "medical_multiturn_messages.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_base(folder: Path, tokenizer: Path, data: Path) -> None:
    """Write the base, its tokenizer, and the rows."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "base")
    lines = data.read_text(encoding="utf-8").splitlines()[:ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def one_turn(folder: Path) -> dict[str, Measured]:
    """Measure each way once."""
    for name in ("runs", "plain"):
        shutil.rmtree(folder / name, ignore_errors=True)
    plain = [sys.executable, __file__, "--plain", str(folder)]
    return {
        "plain Trainer": first_step(plain, folder, folder / "plain" / "step"),
        "qwenlora": ours(folder, "one", steps=1),
        "qwenlora, restart": ours(folder, "one", steps=2),
        "qwenlora, two ranks": ours(folder, "two", steps=1, ranks=2),
    }


def ours(folder: Path, name: str, *, steps: int, ranks: int = 1) -> Measured:
    """Measure `qwenlora train`; the second time it goes on from the first one's checkpoint."""
    run = folder / "runs" / name
    settings = {
        "run_dir": run,
        "model.name_or_path": folder / "base",
        "model.dtype": "float32",
        "data.train": folder / "rows.jsonl",
        "data.max_length": MAX_LENGTH,
        "data.overlength": "truncate",
        "lora.lora_dropout": LORA["lora_dropout"],
        "lora.r": LORA["r"],
        "lora.lora_alpha": LORA["lora_alpha"],
        "train.global_batch_size": BATCH,
        "train.per_device_train_batch_size": BATCH // ranks,
        "train.max_steps": steps,
        "train.eval_strategy": "no",
        "train.gradient_checkpointing": "false",
        "log.wandb": "off",
    }
    config = folder / f"{name}.yaml"
    config.write_text("{}\n")
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return first_step(
        [*COMMAND, "train", str(config), *arguments, "--nproc", str(ranks)],
        folder,
        run / "metrics.jsonl",
        steps,
    )


def first_step(command: list[str], folder: Path, file: Path, lines: int = 1) -> Measured:
    """Run a command; its first step is over when the file has so many lines."""
    start, before = time.time(), os.times()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        seconds = 0.0
        while process.poll() is None:
            if not seconds and file.exists() and file.read_bytes().count(b"\n") >= lines:
                seconds = time.time() - start
            time.sleep(POLL_S)
        assert process.stdout
        output = process.stdout.read().decode()
    if process.returncode or not seconds:
        raise SystemExit(f"{command} ended with {process.returncode}\n{output}")
    return Measured(seconds, cpu_since(before))


def cpu_since(before: os.times_result) -> float:
    """Return the CPU seconds of processes that have ended since."""
    now = os.times()
    return now.children_user + now.children_system - before.children_user - before.children_system


def commands(folder: Path) -> dict[str, list[str]]:
    """Return commands that train nothing, by name."""
    run, config = str(folder / "runs" / "one"), str(folder / "runs" / "one" / "config.yaml")
    return {
        "verify RUN": [*COMMAND, "verify", run],
        "data preview": [*COMMAND, "data", "preview", config],
        "data check": [*COMMAND, "data", "check", config],
        "train of a finished run": [*COMMAND, "train", config],
    }


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of a command."""
    start, before = time.time(), os.times()
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{command} ended with {answer.returncode}\n{answer.stdout}{answer.stderr}")
    return time.time() - start, cpu_since(before)


def show(turns: dict[str, list[Measured]], others: dict[str, list[Measured]]) -> None:
    """Print the tables. Ratios are medians of each turn's."""
    table = Table("from a command to the end of its first step", "seconds", "x plain", "CPU s", "x plain")
    for way, figures in turns.items():
        table.add_row(way, *ratios(figures, turns["plain Trainer"]))
    rest = Table("other commands", "seconds", "CPU s")
    for way, figures in others.items():
        columns = [median(each[number] for each in figures) for number in range(2)]
        rest.add_row(way, *(f"{value:.1f}" for value in columns))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(rest)


def ratios(figures: list[Measured], plain: list[Measured]) -> list[str]:
    """Return a way's columns."""
    columns = []
    for number in range(2):
        columns.append(f"{median(each[number] for each in figures):.1f}")
        pairs = zip(figures, plain, strict=True)
        columns.append(f"{median(each[number] / other[number] for each, other in pairs):.2f}")
    return columns


# ---- the peer


def plain_trainer(folder: Path) -> None:
    """Train one step as transformers' and peft's documentation does."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]

    class Rows(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            chats = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
            self.ids = [tokenizer(chat)["input_ids"][:MAX_LENGTH] for chat in chats]

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, number: int) -> dict[str, Any]:
            ids = self.ids[number]
            return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}

    class FirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (folder / "plain").mkdir(exist_ok=True)
            (folder / "plain" / "step").write_text("1\n")

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(**LORA))
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        per_device_train_batch_size=BATCH,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, arguments, train_dataset=Rows(), data_collator=collator, callbacks=[FirstStep()]).train()


if __name__ == "__main__":
    main()
