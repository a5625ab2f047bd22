"""python benchmarks/train_speed.py: how fast steps are, beside transformers' Trainer and its peers'.

Each way runs in a process of its own, in its own virtual environment, and they take turns step by step: the
same base, adapter, rows and batches. Losses must be alike and gradients not zero, else no number is shown.
README.md beside this file explains the numbers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
BATCH, MOST = 8, 512  # rows of a step, tokens of a row
RATE, RANK, ALPHA = 1e-3, 16, 32
OURS, PLAIN = "qwenlora", "Trainer + peft"
TRL, TRL_BEST, SWIFT, FACTORY = "TRL, default", "TRL, at its best", "ms-swift", "LLaMA-Factory"
OURS_BF16 = "qwenlora, bfloat16"
# hidden size, MLP's width, layers, heads, key and value heads
SHAPES = {
    "42.8M": (256, 1024, 4, 4, 2),
    "0.5B-2-layers": (896, 4864, 2, 14, 2),
    "0.5B": (896, 4864, 24, 14, 2),
}


class Step(NamedTuple):
    """What a way said of a step. cpu_s, wall_s: its time; loss: mean over trained tokens."""

    cpu_s: float
    wall_s: float
    loss: float
    norm: float


# ---- the side that measures


def main() -> None:
    """Measure, and print a table."""
    options = read_options()
    if options.worker:
        work(options.worker, Path(options.folder))
        return
    pythons = {OURS: sys.executable, PLAIN: sys.executable}
    if options.trl_python:
        pythons |= {TRL: options.trl_python, TRL_BEST: options.trl_python}
    if options.swift_python:
        pythons |= {SWIFT: options.swift_python}
    if options.factory_python:
        pythons |= {FACTORY: options.factory_python}
    if options.bf16:
        pythons |= {OURS_BF16: sys.executable}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as name:
        trained = make_inputs(Path(name), options)
        steps = take_turns(Path(name), pythons, options)
    if options.json:
        every = {way: [step._asdict() for step in own] for way, own in steps.items()}
        Path(options.json).write_text(
            json.dumps({"shape": options.shape, "useful_tokens": trained, "steps": every}, indent=1)
        )

    check(steps, trained)
    show(steps, trained)


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="42.8M", help="of a Qwen2 of random weights")
    parser.add_argument("--steps", type=int, default=12, help="of each way, the first two untimed")
    parser.add_argument("--parity-steps", type=int, default=0, help="of ours and plain Trainer, in all")
    parser.add_argument("--tokenizer", default=ASSETS / "tokenizers" / "qwen2.5", help="a Qwen's tokenizer")
    parser.add_argument("--data", default=ASSETS / "data" / "medical_qa_sharegpt.jsonl")
    parser.add_argument("--trl-python", help="of an environment with TRL")
    parser.add_argument("--swift-python", help="of an environment with ms-swift")
    parser.add_argument("--factory-python", help="of an environment with LLaMA-Factory")
    parser.add_argument("--bf16", action="store_true", help="ours with a base in bfloat16, too")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(folder: Path, options: argparse.Namespace) -> list[int]:
    """Write rows, base and adapter for all ways; return the trained tokens of each step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from profile_step import real_rows
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    rows = [
        {"input_ids": row.ids.tolist(), "trained": row.trained.tolist()}
        for row in real_rows(most_steps(options) * BATCH)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    hidden, width, layers, heads, keys = SHAPES[options.shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=True,
        use_cache=False,
    )
    base = Qwen2ForCausalLM(config)
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(folder / "base")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return [sum(sum(row["trained"][1:]) for row in batch) for batch in batches]


def most_steps(options: argparse.Namespace) -> int:
    """Return how many steps the ways train that train most."""
    return max(int(options.steps), int(options.parity_steps))


def take_turns(folder: Path, pythons: dict[str, str], options: argparse.Namespace) -> dict[str, list[Step]]:
    """Return what each way said of each step. Only one of them runs at a time."""
    workers = {}
    for way, python in pythons.items():
        command = [python, __file__, "--worker", way, "--folder", str(folder)]
        workers[way] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )
        assert answer_of(workers[way]) == "ready", way
    steps: dict[str, list[Step]] = {way: [] for way in pythons}
    for number in range(most_steps(options)):
        ways = [way for way in workers if number < options.steps or way in (OURS, PLAIN)]
        # as many begin with one as with the other
        for way in ways[:: 1 if number % 2 else -1]:
            steps[way].append(Step(**ask(workers[way], str(number))))
        print(f"step {number + 1}", end="\r", flush=True, file=sys.stderr)
    for worker in workers.values():
        worker.communicate()
    return steps


def ask(worker: subprocess.Popen[str], line: str) -> dict[str, Any]:
    """Return a worker's answer to a line of its standard input."""
    assert worker.stdin
    worker.stdin.write(f"{line}\n")
    worker.stdin.flush()
    answer: dict[str, Any] = json.loads(answer_of(worker))
    return answer


def answer_of(worker: subprocess.Popen[str]) -> str:
    """Return a worker's next answer; other lines are its libraries'."""
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith("> "):
            return line[2:].strip()
    raise SystemExit(f"{worker.args[3]} ended with exit code {worker.wait()}")  # type: ignore[index]


def check(steps: dict[str, list[Step]], trained: list[int]) -> None:
    """Raises: AssertionError when the ways did not do the same work."""
    plain = steps[PLAIN]
    assert min(trained) > 0
    for way, own in steps.items():
        assert min(step.norm for step in own) > 0, f"{way} learnt nothing"
        apart = max(abs(one.loss - other.loss) / other.loss for one, other in zip(own, plain, strict=False))
        # TRL's default trains all tokens, which these models of random weights hardly tell apart
        most = {TRL: 0.02, OURS_BF16: 0.005}.get(way, 1e-5)
        assert apart <= most, f"losses of {way} differ by {apart:.2g}"


def show(steps: dict[str, list[Step]], trained: list[int]) -> None:
    """Print the table."""
    print(
        "| way | useful tokens a CPU second | CPU seconds a step | wall seconds | losses apart | steps | x |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    plain = steps[PLAIN]
    for way, own in steps.items():
        timed = list(zip(trained, own, plain, strict=False))[2:]
        speed = median(tokens / step.cpu_s for tokens, step, _ in timed)
        cpu, wall = median(step.cpu_s for _, step, _ in timed), median(step.wall_s for _, step, _ in timed)
        ratio = median(other.cpu_s / step.cpu_s for _, step, other in timed)
        apart = max(abs(one.loss - other.loss) for one, other in zip(own, plain, strict=False))
        figures = f"{speed:,.0f} | {cpu:.2f} | {wall:.2f} | {apart:.1e} | {len(own)} | {ratio:.2f}"
        print(f"| {way} | {figures} |")


# ---- a way, in a process of its own


def work(way: str, folder: Path) -> None:
    """Train a step for each line of stdin, the number of its batch; say on stdout what it cost."""
    import torch

    torch.set_num_threads(1)
    rows = json.loads((folder / "rows.json").read_text())
    make = {
        OURS: ours,
        OURS_BF16: ours_in_bf16,
        PLAIN: plain_trainer,
        TRL: trl,
        TRL_BEST: trl_at_its_best,
        SWIFT: swift,
        FACTORY: factory,
    }
    trainer, batch_of = make[way](folder, rows)
    make_ready(trainer)
    print("> ready", flush=True)
    for line in sys.stdin:
        start = int(line) * BATCH
        batch = batch_of(rows[start : start + BATCH])
        wall, cpu = time.perf_counter(), time.process_time()
        loss, norm = step(trainer, batch)
        spent = Step(time.process_time() - cpu, time.perf_counter() - wall, loss, norm)
        print(f"> {json.dumps(spent._asdict())}", flush=True)


def make_ready(trainer: Any) -> None:
    """Do what a trainer does before its first step."""
    trainer.create_optimizer()
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # autocast, with bf16
    trainer.model.train()


def step(trainer: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Train a step by the trainer's own method; return its loss and its gradients' norm."""
    number = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.training_step(trainer.model, batch, number)
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss.item(), float(norm)


def peft_model(folder: Path) -> Any:
    """Return base and adapter, as peft loads them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch with padding on the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        labels[number, :length] = ids[number, :length].where(torch.tensor(row["trained"]), -100)
        mask[number, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def settings(folder: Path, way: str) -> dict[str, Any]:
    """Return arguments that all trainers of transformers' kind take."""
    return {
        "output_dir": str(folder / way),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,  # ms-swift would take 2
        "max_steps": 1000,
        "adam_beta2": 0.999,  # ms-swift's default is another
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def plain_trainer(folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """transformers' Trainer over a model of peft."""
    from transformers import Trainer, TrainingArguments

    return Trainer(peft_model(folder), TrainingArguments(**settings(folder, "plain"))), padded


def ours_in_bf16(folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """ours() over a base in bfloat16, as `model.dtype: auto` has it on a CPU that multiplies that."""
    return ours(folder, rows, "bfloat16")


def ours(folder: Path, rows: list[dict[str, Any]], dtype: str = "float32") -> tuple[Any, Any]:
    """qwenlora's trainer, its model built as a run builds it."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from profile_step import ours_of, side_of
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwenlora.data.chat import Tokens
    from qwenlora.trainer.loop.batches import collate_packs

    words = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    side = side_of([tokens_of(Tokens, row) for row in rows])
    trainer = ours_of(base, words, side, folder / "ours", len(rows) // BATCH, RATE, dtype)
    assert trainer.end_to_end, "rows are padded"
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder / "adapter"), device="cpu"))
    numbers = {id(row): number for number, row in enumerate(rows)}
    return trainer, lambda some: collate_packs([[side.row(numbers[id(row)]) for row in some]], 0)


def tokens_of(kind: Any, row: dict[str, Any]) -> Any:
    """Return a row as the tokens that qwenlora prepares."""
    import numpy as np

    return kind(np.array(row["input_ids"], np.int32), np.array(row["trained"]))


def trl(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """TRL's SFTTrainer; without options as a user gets it who sets none."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder / "base")
    return trl_over(peft_model(folder), words, rows, **settings(folder, "trl"), **options)


def trl_over(model: Any, words: Any, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """TRL's SFTTrainer over a model. words: its tokenizer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masked = [
        {"input_ids": row["input_ids"], "completion_mask": list(map(int, row["trained"]))} for row in rows
    ]
    data = Dataset.from_list(masked)
    trainer = SFTTrainer(model, SFTConfig(**options), train_dataset=data, processing_class=words)
    prepared = trainer.train_dataset  # with labels, where masks count
    assert len(prepared) == len(rows)
    numbers = {id(row): number for number, row in enumerate(rows)}
    return trainer, lambda some: trainer.data_collator([prepared[numbers[id(row)]] for row in some])


def trl_at_its_best(folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """TRL in float32 without activation checkpointing, training the replies alone, as the others."""
    return trl(folder, rows, bf16=False, gradient_checkpointing=False, completion_only_loss=True)


def swift(folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """ms-swift's trainer for causal models; the model is loaded by ms-swift, which marks it."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from swift import get_model_processor, get_template
    from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    arguments = Seq2SeqTrainingArguments(
        **settings(folder, "swift"), bf16=False, gradient_checkpointing=False, check_model=False
    )
    base, words = get_model_processor(
        str(folder / "base"), torch_dtype=torch.float32, model_type="qwen2", device_map="cpu"
    )
    marks = {"model_meta": base.model_meta, "model_info": base.model_info}
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    for name, mark in marks.items():
        setattr(model, name, mark)
    template = get_template(words, template_type="qwen2_5")
    template.set_mode("train")
    data = Dataset.from_list([{"length": len(row["input_ids"])} for row in rows])
    return Seq2SeqTrainer(model=model, args=arguments, template=template, train_dataset=data), padded


def factory(folder: Path, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """LLaMA-Factory's trainer for supervised fine-tuning."""
    from llamafactory.hparams import FinetuningArguments, TrainingArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from transformers import AutoTokenizer

    arguments = TrainingArguments(**settings(folder, "factory"), bf16=False, gradient_checkpointing=False)
    words = AutoTokenizer.from_pretrained(folder / "base")
    finetuning = FinetuningArguments(stage="sft", finetuning_type="lora")
    trainer = CustomSeq2SeqTrainer(
        finetuning, None, model=peft_model(folder), args=arguments, tokenizer=words
    )
    return trainer, padded


if __name__ == "__main__":
    main()
