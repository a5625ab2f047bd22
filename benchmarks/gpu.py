"""python benchmarks/gpu.py PART: how fast steps are on one GPU, beside plain transformers and peft.

Each part takes at most four minutes. Weights are random and made on the GPU; nothing is downloaded. Each way
has a process of its own, and they take turns of some steps. Losses must be alike and gradients not zero, else
no number is shown. README.md beside this file explains the parts and the numbers.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from expert_lora import APART, memory
from profile_step import ours_of, side_of
from train_speed import (
    OURS,
    PLAIN,
    TRL_BEST,
    answer_of,
    ask,
    make_ready,
    padded,
    settings,
    tokens_of,
    trl_over,
)
from train_speed import step as train_step
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from qwenlora.configs.schema import Lora
from qwenlora.data.chat import Tokens
from qwenlora.plan.bases import known
from qwenlora.plan.flops import flops
from qwenlora.plan.hardware import of_driver
from qwenlora.trainer.calibrate import calibrate, name_of
from qwenlora.trainer.loop import trainer as trainer_module
from qwenlora.trainer.loop.batches import collate, collate_packs
from qwenlora.trainer.model import fused, row_attention
from qwenlora.trainer.model.loading import set_up
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.model.tiny import build_tiny
from qwenlora.trainer.model.work import work_of

CEILINGS, WHOLE, LEAVE_OUT, EXPERTS, NF4 = "ceilings", "whole", "leave-out", "experts", "nf4"
LORA = Lora(lora_dropout=0.0)
TOKENS = 4096  # of a step
SHARE = 0.9  # of the GPU's free memory that is used
KEPT = 2.3  # times what fused layers keep: plain peft
NORMS_APART = {"float32": 1e-4, "bfloat16": 5e-2}  # of ways' gradients, as shares
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# what our trainer does by functions of its own: where each is called, and what it says if it does nothing
OWN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "LoRA and MLPs": (fused, "fuse_lora", lambda model: (0, model.config.num_hidden_layers, 0)),
    "norms": (fused, "fuse_norms", lambda model: 0),
    "RoPE": (fused, "fuse_rope", lambda model: False),
    "head and loss": (trainer_module, "own_the_loss", lambda *_, **__: ""),
    "rows in one call": (row_attention, "attend_row_by_row", lambda model: False),
}


class Part(NamedTuple):
    """What a part trains. ways: that take turns; shape: a Qwen of plan/bases.yaml; most_layers: of it; mixed:
    whether a step has eight rows of different lengths, instead of one; nf4: whether the base is in 4 bits."""

    ways: tuple[str, ...]
    shape: str = "Qwen2.5-7B"
    most_layers: int = 1000
    mixed: bool = False
    nf4: bool = False

    @property
    def here(self) -> list[str]:
        """The ways that are installed."""
        return [way for way in self.ways if way != TRL_BEST or importlib.util.find_spec("trl")]


PARTS = {
    WHOLE: Part((PLAIN, OURS, TRL_BEST)),
    LEAVE_OUT: Part((OURS, *(f"without {name}" for name in OWN)), mixed=True),
    EXPERTS: Part((PLAIN, OURS), "Qwen3-30B-A3B", most_layers=12),
    NF4: Part((PLAIN, OURS), nf4=True),
}


class Job(NamedTuple):
    """What each way of a part works on. values: of the base's config.json; lengths: of the rows of a step;
    steps: in all."""

    values: dict[str, Any]
    device: str
    dtype: str
    lengths: list[int]
    nf4: bool
    steps: int


class Step(NamedTuple):
    """What a way said of a step. seconds: wall time; loss: mean over trained tokens; norm: of gradients."""

    seconds: float
    loss: float
    norm: float


class Turn(NamedTuple):
    """Some steps of a way, the first untimed. peak_bytes: of GPU memory; on a CPU, of the process; full:
    whether the GPU was too small."""

    steps: list[Step]
    peak_bytes: int
    full: bool = False


# ---- the side that measures


def main(arguments: list[str] | None = None) -> None:
    """Measure a part, print a table, and write the figures."""
    options = read_options(arguments)
    if options.worker:
        serve(options.worker, Path(options.folder))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == CEILINGS:
        write(options, ceilings())
        return
    part = PARTS[options.part]
    job = job_of(part, options)
    turns = take_turns(part, job, options)
    check(turns, job.dtype)
    write(
        options, show(turns, job, options) | {"layers": job.values["num_hidden_layers"], "dtype": job.dtype}
    )


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=[CEILINGS, *PARTS], nargs="?", default=WHOLE)
    parser.add_argument("--shape", choices=known(), help="of the base, instead of the part's")
    parser.add_argument("--layers", type=int, help="of the base; by default as many as the GPU holds")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--turns", type=int, default=4, help="of each way")
    parser.add_argument("--steps", type=int, default=4, help="of a turn, the first untimed")
    parser.add_argument("--limit-s", type=float, default=150, help="no turn begins after so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in float32, to try the script")
    folder = os.environ.get("OUT") or Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=Path(folder), help="where the figures go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shape = options.shape or (PARTS[options.part].shape if options.part in PARTS else None)
    if options.tiny:
        options.tokens = 96
    return options


def ceilings() -> dict[str, Any]:
    """Print and return how fast the bare device is: products of matrices, and copies."""
    name, rates = calibrate()
    print(
        f"{name}: "
        + ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in rates.products.items())
    )
    print(f"copies read and write {rates.memory / 1e12:.3f} TB/s together")
    return {"card": name, "rates": rates.model_dump()}


def job_of(part: Part, options: argparse.Namespace) -> Job:
    """Return what the ways of a part work on."""
    values = {"tie_word_embeddings": False} | known()[options.shape] | {"use_cache": False}
    if options.tiny:
        values |= TINY | (TINY_EXPERTS if "num_experts" in values else {})
    shares = np.array([12, 3, 7, 1, 9, 4, 6, 6] if part.mixed else [1])
    lengths = (shares * options.tokens // shares.sum()).tolist()
    if options.device == "cuda" or options.layers:
        most = min(part.most_layers, values["num_hidden_layers"])
        values["num_hidden_layers"] = options.layers or layers_that_fit(
            values, most, len(part.here), options.tokens
        )
    dtype = "float32" if options.tiny else "bfloat16"
    return Job(values, options.device, dtype, lengths, part.nf4, options.turns * options.steps)


def layers_that_fit(values: dict[str, Any], most: int, ways: int, tokens: int) -> int:
    """Return how many layers the GPU holds: of each way's weights, of plain peft's activations, and of the
    copy that it makes of experts."""
    room = SHARE * torch.cuda.mem_get_info()[0]
    width = values.get("moe_intermediate_size", 0) * values.get("num_experts_per_tok", 0)
    kept = KEPT * 2 * (8 * values["hidden_size"] + 2 * (width or values["intermediate_size"])) * tokens

    def taken(layers: int) -> float:
        model = on_meta(values | {"num_hidden_layers": layers})
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters()) - trained
        return ways * (2 * frozen + 16 * trained) + layers * kept + (2 * frozen if width else 0)

    layer = taken(2) - taken(1)
    fixed = taken(1) - layer + 12 * values["vocab_size"] * tokens  # with logits
    fitting = min(most, int((room - fixed) / layer))
    if fitting < 1:
        raise SystemExit(
            f"the GPU has {room / 1e9:.0f} GB to use, too few for one layer; name a smaller --shape"
        )
    return fitting


def on_meta(values: dict[str, Any]) -> Any:
    """Return a base with its adapter, without numbers."""
    with torch.device("meta"):
        return add_lora(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)), LORA)


def take_turns(part: Part, job: Job, options: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return each way's turns. Only one works at a time; a way that is too large for the GPU is left out."""
    ways = part.here
    end = time.monotonic() + options.limit_s
    with tempfile.TemporaryDirectory(prefix="gpu-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job._asdict()))
        build_tiny(folder / "tiny")  # its tokenizer
        workers = {way: stack.enter_context(started(way, folder)) for way in ways}
        turns: dict[str, list[Turn]] = {way: [] for way in ways}
        for number in range(options.turns):
            # as many begin with one as with the other
            for way in ways[:: 1 if number % 2 else -1]:
                if not turns[way] or (time.monotonic() < end and not turns[way][-1].full):
                    turns[way].append(workers[way](number * options.steps, options.steps))
            print(f"turn {number + 1}", end="\r", flush=True, file=sys.stderr)
    if all(own[-1].full for own in turns.values()):
        raise SystemExit("the GPU is too small for every way; name fewer --layers or --tokens")
    whole = min(len(own) for own in turns.values() if not own[-1].full)  # those that time was left for
    return {way: own if own[-1].full else own[:whole] for way, own in turns.items()}


@contextmanager
def started(way: str, folder: Path) -> Iterator[Callable[[int, int], Turn]]:
    """Start a way's process; yield what asks it for a turn: the first step's number, and how many."""
    command = [sys.executable, __file__, "--worker", way, "--folder", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as worker:
        waits = True

        def turn(first: int, count: int) -> Turn:
            nonlocal waits
            if waits:  # all import at the same time
                assert answer_of(worker) == "ready", way
                waits = False
            answer = ask(worker, f"{first} {count}")
            return Turn([Step(*step) for step in answer["steps"]], answer["peak_bytes"], answer["full"])

        try:
            yield turn
        finally:
            worker.kill()


def check(turns: dict[str, list[Turn]], dtype: str) -> None:
    """Raises: AssertionError when the ways did not do the same work. The losses of random weights and tokens
    hardly tell ways apart; the norms of their gradients do."""
    done = {way: steps_of(own) for way, own in turns.items() if not own[-1].full}
    against = next(iter(done.values()))
    for way, steps in done.items():
        assert min(step.norm for step in steps) > 0, f"{way} learnt nothing"
        for what, most in (("loss", APART[dtype]), ("norm", NORMS_APART[dtype])):
            pairs = [
                (getattr(one, what), getattr(other, what)) for one, other in zip(steps, against, strict=True)
            ]
            apart = max(abs(one - other) / other for one, other in pairs)
            assert apart <= most, f"{way}: a {what} differs by {apart:.2g}"


def steps_of(turns: list[Turn]) -> list[Step]:
    """Return all steps of some turns."""
    return [step for turn in turns for step in turn.steps]


def show(turns: dict[str, list[Turn]], job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Print the table; return its figures, and those that it is made of."""
    on_gpu, card = job.device == "cuda", name_of(torch.device(job.device))
    known_gpu = of_driver(torch.cuda.get_device_name()) if on_gpu else None
    peak = known_gpu.flops if known_gpu else float("nan")
    bare = bare_products(options, job.dtype, card)
    config = AutoConfig.for_model(**job.values)
    useful = flops(
        work_of(on_meta(job.values), config), np.array(job.lengths), sum(job.lengths) - len(job.lengths)
    )
    first, *_ = [way for way, own in turns.items() if not own[-1].full]
    print(
        f"{options.shape}, {job.values['num_hidden_layers']} layers, {sum(job.lengths)} tokens a step, {card}"
    )
    print(
        f"| way | tokens/s | ms a step | x {first} | MFU | of bare products | peak GB | of {first}'s | loss |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    figures: dict[str, Any] = {}
    for way, own in turns.items():
        if own[-1].full:
            print(f"| {way} | out of memory | | | | | | | |")
            continue
        pairs = [
            (mine, theirs)
            for one, other in zip(own, turns[first], strict=True)
            for mine, theirs in list(zip(one.steps, other.steps, strict=True))[1:]
        ]
        seconds = median(mine.seconds for mine, _ in pairs)
        row = {
            "tokens_per_s": sum(job.lengths) / seconds,
            "times": median(theirs.seconds / mine.seconds for mine, theirs in pairs),
            "mfu": useful / seconds / peak,
            "of_bare_products": useful / seconds / bare,
            "peak_gb": max(turn.peak_bytes for turn in own) / 1e9,
        }
        figures[way] = row | {"turns": own}
        less = row["peak_gb"] / figures[first]["peak_gb"]
        print(
            f"| {way} | {row['tokens_per_s']:,.0f} | {1000 * seconds:.1f} | {row['times']:.2f}"
            f" | {row['mfu']:.1%} | {row['of_bare_products']:.1%} | {row['peak_gb']:.1f} | {less:.2f}"
            f" | {own[-1].steps[-1].loss:.4f} |"
        )
    return {"flops_a_step": useful, "ways": figures}


def bare_products(options: argparse.Namespace, dtype: str, card: str) -> float:
    """Return what the part `ceilings` found of this card before, FLOP/s; without it, NaN."""
    file = file_of(options, CEILINGS)
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("card") != card:
        return float("nan")
    return float(found["rates"]["products"].get(dtype, "nan"))


def file_of(options: argparse.Namespace, part: str) -> Path:
    """Return where a part's figures go. What is not the default is in the name: a try replaces nothing."""
    names = ["gpu", part]
    if part != CEILINGS:
        names += [options.shape] if options.shape != PARTS[part].shape else []
        names += [f"{options.layers}-layers"] if options.layers else []
        names += [f"{options.tokens}-tokens"] if options.tokens != TOKENS and not options.tiny else []
        names += ["tiny"] if options.tiny else []
    names += [options.device] if options.device != "cuda" else []
    file: Path = options.out / f"{'-'.join(names)}.json"
    return file


def write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures, with date, card and versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    card = name_of(torch.device(options.device))
    told = {"part": options.part, "date": time.strftime("%Y-%m-%d"), "card": card, "versions": versions}
    told |= {"shape": options.shape, "tokens": options.tokens}
    file = file_of(options, options.part)
    file.write_text(json.dumps(told | figures, indent=1), encoding="utf-8")
    print(f"figures: {file}")


# ---- a way, in a process of its own


def serve(way: str, folder: Path) -> None:
    """Answer each line of stdin, a turn's first step and how many."""
    work = worker(way, folder)
    print("> ready", flush=True)
    for line in sys.stdin:
        print(f"> {json.dumps(work(*map(int, line.split()))._asdict())}", flush=True)


def worker(way: str, folder: Path) -> Callable[[int, int], Turn]:
    """Return what trains a turn of a way."""
    job = Job(**json.loads((folder / "job.json").read_text()))
    rows = rows_of(job)
    trainer, batch_of = trainer_of(way, job, rows, folder)
    make_ready(trainer)
    on_gpu, batch = job.device == "cuda", len(job.lengths)

    def turn(first: int, count: int) -> Turn:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps: list[Step] = []
        full = False
        try:
            for number in range(first, first + count):
                inputs = batch_of(rows[number * batch : (number + 1) * batch])
                start = time.perf_counter()
                loss, norm = train_step(trainer, inputs)  # both are numbers: the GPU is done
                steps.append(Step(time.perf_counter() - start, loss, norm))
        except RuntimeError as error:  # our trainer names torch's in its own
            if "memory" not in str(error):
                raise
            full = True
        peak = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")
        if on_gpu:
            torch.cuda.empty_cache()  # the next way has the same GPU
        return Turn(steps, peak, full)

    return turn


def rows_of(job: Job) -> list[dict[str, Any]]:
    """Return the rows of all steps, of random tokens; all but the first of a row are trained."""
    draw = np.random.RandomState(0)
    rows = [draw.randint(0, job.values["vocab_size"], length).tolist() for length in job.lengths * job.steps]
    return [{"input_ids": row, "trained": [False] + [True] * (len(row) - 1)} for row in rows]


def trainer_of(way: str, job: Job, rows: list[dict[str, Any]], folder: Path) -> tuple[Any, Any]:
    """Return a way's trainer, and what makes a batch of rows."""
    words = AutoTokenizer.from_pretrained(folder / "tiny")
    base = base_of(job)
    if way in (PLAIN, TRL_BEST):
        torch.manual_seed(1)  # as ours_of
        model = add_lora(base, LORA)  # peft's; nothing is fused
        options = settings(folder, way) | {
            "per_device_train_batch_size": len(job.lengths),
            "use_cpu": job.device == "cpu",
            "bf16": job.dtype == "bfloat16",
        }
        if way == TRL_BEST:
            return trl_over(
                model, words, rows, **options, gradient_checkpointing=False, completion_only_loss=True
            )
        return Trainer(model, TrainingArguments(**options)), padded
    side = side_of([tokens_of(Tokens, row) for row in rows])
    left_out = way.removeprefix("without ") if way != OURS else ""
    with mock.patch.object(*OWN[left_out]) if left_out else ExitStack():
        trainer = ours_of(
            base,
            words,
            side,
            folder / way.replace(" ", "-"),
            job.steps,
            dtype=job.dtype,
            batch=len(job.lengths),
        )
    numbers = {id(row): number for number, row in enumerate(rows)}

    def batch_of(some: list[dict[str, Any]]) -> Any:
        units = [side.row(numbers[id(row)]) for row in some]
        return collate_packs([units], 0) if trainer.end_to_end else collate(units, 0)

    return trainer, batch_of


def base_of(job: Job) -> Any:
    """Return the base, of the same random weights in each process."""
    torch.manual_seed(0)
    with torch.device(job.device):
        base = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**job.values), dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
        )
    if job.nf4:
        into_4_bits(base)
    set_up(base)
    return base


def into_4_bits(base: Any) -> None:
    """Make a base's linear layers, but for its head, what transformers makes of them with nf4."""
    import bitsandbytes as bnb

    for parent in list(base.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear and linear is not base.get_output_embeddings():
                small = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    compute_dtype=linear.weight.dtype,
                    device="meta",
                )
                weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                small.weight, small.bias = weight, linear.bias
                setattr(parent, name, small.to(linear.weight.device))
    base.is_loaded_in_4bit = True


if __name__ == "__main__":
    main()
