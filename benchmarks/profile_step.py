"""python benchmarks/profile_step.py: what a step keeps, calls and costs, beside transformers' Trainer.

Two trainers take turns on the same real rows, in one process: Trainer over a model of plain peft, and ours.
Their losses must be equal and their gradients not zero, else no number is shown. README.md beside this file
explains the numbers. (A script called profile.py would stand in the way of Python's module.)
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_speed import step
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Trainer

from qwenlora.configs.schema import Config, Data, Lora, Model, Train
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.prepared import Side
from qwenlora.data.rows import Row
from qwenlora.data.turns import Message
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows, collate, collate_packs
from qwenlora.trainer.loop.trainer import LoraTrainer
from qwenlora.trainer.model import fused, row_attention
from qwenlora.trainer.model.loading import set_up
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.model.tiny import build_tiny

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
BATCH, MOST = 8, 512  # rows of a step, tokens of a row
PLAIN, OURS = "Trainer + peft", "qwenlora"


class Figures(NamedTuple):
    """What steps of a way cost. saved_bytes: kept for the backward pass, a slot of the batch; operations: of
    aten in a whole step; cpu_s: process time of each step; losses, norms: of each step."""

    saved_bytes: float
    operations: int
    cpu_s: list[float]
    losses: list[float]
    norms: list[float]


def real_rows(count: int) -> list[Tokens]:
    """Return medical questions and answers as tokens; random ones where there are no assets."""
    file, words = ASSETS / "data" / "medical_qa_sharegpt.jsonl", ASSETS / "tokenizers" / "qwen2.5"
    if not file.exists():
        random = np.random.RandomState(0)
        lengths = random.randint(40, 300, count)
        return [Tokens(random.randint(300, 9000, n).astype(np.int32), np.arange(n) > n // 3) for n in lengths]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in zip(range(count), lines, strict=False):
            turns = json.loads(line)["conversations"]
            messages = [Message(role=roles[turn["from"]], content=turn["value"]) for turn in turns]
            rows.append(Row(number, messages))
    encoded = Encoder(AutoTokenizer.from_pretrained(words)).encode(rows)
    return [Tokens(row.ids[:MOST], row.trained[:MOST]) for row in encoded if isinstance(row, Tokens)]


def side_of(rows: list[Tokens]) -> Side:
    """Return rows as a side of prepared data."""
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    numbers = np.arange(len(rows), dtype=np.int32)
    return Side(
        np.concatenate([row.ids for row in rows]),
        np.concatenate([row.trained for row in rows]),
        np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64),
        lengths,
        np.array([row.trained.sum() for row in rows], np.int32),
        numbers,
        np.zeros((len(rows), 3), np.int32),
    )


def base_of(args: argparse.Namespace) -> Any:
    """Return a Qwen2 of random weights; by default of 42.8 million."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151_936,
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=max(1, args.hidden // 128),
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    set_up(base, args.recomputed)
    return base


def ours_of(
    base: Any,
    words: Any,
    side: Side,
    folder: Path,
    steps: int,
    rate: float = 1e-3,
    dtype: str = "float32",
    batch: int = BATCH,
) -> Any:
    """Return our trainer over a base, its model built as trainer/build.py does, and all of it fused. batch:
    rows of a step."""
    train = Train(
        global_batch_size=batch,
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=0.0,
        eval_strategy="no",
        save_strategy="no",
    )
    lora = Lora(lora_dropout=0.0)
    model_of_run = Model(name_or_path="x", dtype=dtype)
    config = Config(run_dir="unused", model=model_of_run, data=Data(train="x"), lora=lora, train=train)
    arguments = training_arguments(config, RunFolder(folder), len(side), 1, evaluates=False)
    row_attention.attend_row_by_row(base)
    torch.manual_seed(1)
    model = add_lora(base, lora)
    done = fused.fuse(model)
    assert done.mlps + done.experts == base.config.num_hidden_layers
    return LoraTrainer(model, config, arguments, Rows(order_of(config, side), side), processing_class=words)


def trainers(args: argparse.Namespace, side: Side, folder: Path) -> dict[str, Any]:
    """Return transformers' trainer and ours, whose adapters begin with the same weights."""
    build_tiny(folder / "tiny")
    words = AutoTokenizer.from_pretrained(folder / "tiny")
    ours = ours_of(base_of(args), words, side, folder, args.steps)
    assert ours.end_to_end, "rows are padded"
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = Trainer(get_peft_model(base_of(args), settings), ours.args, processing_class=words)
    plain.model.load_state_dict(ours.model.state_dict())
    for trainer in (plain, ours):
        trainer.create_optimizer()
        trainer.model.train()
    return {PLAIN: plain, OURS: ours}


class Operations(TorchDispatchMode):
    """Counts calls of aten's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **kwargs or {})


class Alive(TorchDispatchMode):
    """Knows which storages were made while it is on, and how many bytes of them are still alive. before:
    tensors from which views are made."""

    def __init__(self, before: Iterator[Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._before:  # no view of a weight
                    self.made[StorageWeakRef(storage)] = storage.nbytes()
        return results

    @property
    def bytes(self) -> int:
        """The bytes of storages that something still holds."""
        return sum(size for storage, size in self.made.items() if not storage.expired())


def saved_bytes(trainer: Any, batch: dict[str, Tensor]) -> int:
    """Return the bytes that a forward pass leaves alive for the backward pass."""
    with Alive(trainer.model.parameters()) as alive:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1.0))
    saved = alive.bytes
    loss.backward()
    trainer.model.zero_grad()
    return saved


def measure(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Figures]:
    """Return the figures of both ways. Raises: AssertionError when they did not do the same work."""
    side = side_of(real_rows(args.steps * BATCH))
    with tempfile.TemporaryDirectory() as folder:
        both = trainers(args, side, Path(folder))
        found = {name: Figures(0.0, 0, [], [], []) for name in both}
        for number, batch in enumerate(batches(side)):
            slots = batch[PLAIN]["input_ids"].numel()
            # as many begin with one as with the other: the second finds the rows in the cache
            for name in list(both)[:: 1 if number % 2 else -1]:
                start = time.process_time()
                loss, norm = step(both[name], dict(batch[name]))
                found[name].cpu_s.append(time.process_time() - start)
                found[name].losses.append(loss)
                found[name].norms.append(norm)
            tell(f"step {number + 1}")
        for name, trainer in both.items():
            saved = saved_bytes(trainer, batch[name]) / slots
            with Operations() as counted:
                step(trainer, dict(batch[name]))
            found[name] = found[name]._replace(saved_bytes=saved, operations=counted.calls.total())
    plain, ours = found.values()
    assert min(plain.norms + ours.norms) > 0, "nothing was learnt"
    apart = max(abs(one - other) for one, other in zip(plain.losses, ours.losses, strict=True))
    assert apart <= 1e-5 * max(plain.losses), f"losses differ by {apart:.2g}"
    return found


def batches(side: Side) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield batches of rows, in the file's order, by way: padded for Trainer, end to end for ours."""
    for start in range(0, len(side) // BATCH * BATCH, BATCH):
        rows = [side.row(number) for number in range(start, start + BATCH)]
        yield {PLAIN: collate(rows, 0), OURS: collate_packs([rows], 0)}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each way, the first two untimed")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recomputed", type=int, default=0, help="layers, as train.gradient_checkpointing")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args, lambda what: print(what, end="\r", flush=True))
    plain, ours = found.values()
    ratios = [one / other for one, other in zip(plain.cpu_s[2:], ours.cpu_s[2:], strict=True)]
    print("| way | saved bytes a slot | aten operations a step | CPU seconds a step | times as fast |")
    print("|---|---:|---:|---:|---:|")
    for name, figures in found.items():
        times = 1.0 if figures is plain else median(ratios)
        seconds = median(figures.cpu_s[2:])
        print(
            f"| {name} | {figures.saved_bytes:,.0f} | {figures.operations:,} | {seconds:.2f} | {times:.2f} |"
        )
    apart = max(abs(one - other) for one, other in zip(plain.losses, ours.losses, strict=True))
    print(f"losses {ours.losses[0]:.4f} to {ours.losses[-1]:.4f}, at most {apart:.1e} apart")
    if args.json:
        every = {name: figures._asdict() for name, figures in found.items()}
        args.json.write_text(json.dumps(every | {"ratios": ratios}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
