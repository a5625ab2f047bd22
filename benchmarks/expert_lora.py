"""python benchmarks/expert_lora.py: LoRA on a mixture's experts, beside peft's way with their parameters.

Each way runs in a process of its own, and they take turns step by step: the same base, adapter and rows,
plain transformers and peft but for the experts. Losses must be equal, gradients not zero, and our operations
those that are useful, else no number is shown. Then the experts of a layer are timed alone, forward and
backward, and beside them the bare matrix products that ours need: no way with these products can be faster.
README.md beside this file explains the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import train_speed
from train_speed import answer_of

OURS, PEFT, LOOP = "qwenlora", "peft", "peft, experts in a loop"
WAYS = (PEFT, LOOP, OURS)
ROW, VOCABULARY = 64, 1024  # tokens of a row
APART = {"float32": 1e-5, "bfloat16": 2e-2}  # losses of ways, at most
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
}
# memory that is freed goes back at once, so that a peak is that of its own step
TIDY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Step(NamedTuple):
    """What a way said of a step. cpu_s: process time; loss: mean over tokens; norm: of all gradients."""

    cpu_s: float
    loss: float
    norm: float


class Figures(NamedTuple):
    """What steps of some tokens cost a way. alone: CPU seconds of a layer's experts; peak_bytes: host memory
    above that before the step; flops: that torch counts in it; useful: by plan/flops.py; products: CPU
    seconds of ours, bare."""

    steps: list[Step]
    alone: list[float]
    peak_bytes: int
    flops: float
    useful: float
    products: list[float]


# ---- the side that measures


def main() -> None:
    """Measure, and print a table."""
    options = read_options()
    if options.worker:
        work(options.worker, options.rank, options.dtype)
        return
    found = {tokens: measure(tokens, options) for tokens in options.tokens}
    if options.json:
        every = {
            tokens: {way: figures._asdict() for way, figures in ways.items()}
            for tokens, ways in found.items()
        }
        options.json.write_text(json.dumps(every, indent=1), encoding="utf-8")
    for ways in found.values():
        check(ways, APART[options.dtype])
    show(found)


def read_options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="of a step")
    parser.add_argument("--steps", type=int, default=10, help="of each way, the first two untimed")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--dtype", choices=APART, default="float32", help="of the base")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(tokens: int, options: argparse.Namespace) -> dict[str, Figures]:
    """Return what steps of so many tokens cost each way."""
    timed = {way: start(way, options) for way in WAYS}
    steps: dict[str, list[Step]] = {way: [] for way in WAYS}
    alone: dict[str, list[float]] = {way: [] for way in WAYS}
    products: list[float] = []
    for number in range(options.steps):
        # as many begin with one as with the other
        for way in WAYS[:: 1 if number % 2 else -1]:
            steps[way].append(Step(**ask(timed[way], "step", tokens, number)))
            alone[way].append(ask(timed[way], "alone", tokens, number)["cpu_s"])
        products.append(ask(timed[OURS], "products", tokens, number)["cpu_s"])
        print(f"{tokens} tokens, step {number + 1}", end="\r", flush=True, file=sys.stderr)
    counted = {way: ask(timed[way], "flops", tokens, 0) for way in WAYS}
    end(timed)
    peaks = {}
    for way in WAYS:
        worker = start(way, options, **TIDY)
        ask(worker, "step", tokens, 0)
        peaks[way] = ask(worker, "peak", tokens, 1)["bytes"]
        end({way: worker})
    return {
        way: Figures(steps[way], alone[way], peaks[way], **counted[way], products=products) for way in WAYS
    }


def start(way: str, options: argparse.Namespace, **variables: str) -> subprocess.Popen[str]:
    """Start a way's process, and wait until it has its model."""
    command = [sys.executable, __file__, "--worker", way, "--rank", str(options.rank)]
    command += ["--dtype", options.dtype]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    )
    assert answer_of(worker) == "ready", way
    return worker


def ask(worker: subprocess.Popen[str], what: str, tokens: int, number: int) -> dict[str, Any]:
    """Return a worker's answer to a line of work()."""
    return train_speed.ask(worker, f"{what} {tokens} {number}")


def end(workers: dict[str, subprocess.Popen[str]]) -> None:
    """Let workers end."""
    for worker in workers.values():
        worker.communicate()


def check(ways: dict[str, Figures], most: float) -> None:
    """Raises: AssertionError when the ways did not do the same work, or ours did more than is useful. most:
    that losses may be apart."""
    for way, figures in ways.items():
        assert min(step.norm for step in figures.steps) > 0, f"{way} learnt nothing"
        pairs = zip(figures.steps, ways[PEFT].steps, strict=True)
        apart = max(abs(one.loss - other.loss) for one, other in pairs)
        assert apart <= most, f"losses of {way} differ by {apart:.2g}"
    ours = ways[OURS]
    assert abs(ours.flops / ours.useful - 1) <= 0.05, f"{ours.flops / ours.useful:.3f} of the useful FLOPs"


def show(found: dict[int, dict[str, Figures]]) -> None:
    """Print the table."""
    print(
        "| tokens a step | way | CPU seconds a step | times as fast | experts alone | peak MB | of peft's |"
        " FLOPs / useful |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for tokens, ways in found.items():
        peft = ways[PEFT]
        for way, figures in ways.items():
            pairs = list(zip(peft.steps, figures.steps, strict=True))[2:]
            times = median(other.cpu_s / own.cpu_s for other, own in pairs)
            seconds = median(own.cpu_s for _, own in pairs)
            print(
                f"| {tokens} | {way} | {seconds:.3f} | {times:.2f} | {ratio(peft.alone, figures.alone):.2f} |"
                f" {figures.peak_bytes / 1e6:,.0f} | {figures.peak_bytes / peft.peak_bytes:.2f} |"
                f" {figures.flops / figures.useful:.2f} |"
            )
    for tokens, ways in found.items():
        ours = ways[OURS]
        print(
            f"{tokens} tokens: bare products are {1 / ratio(ours.alone, ours.products):.0%} of our experts'"
            f" time; with nothing else they would be {ratio(ways[PEFT].alone, ours.products):.2f} times as"
            " fast as peft's"
        )


def ratio(ones: list[float], others: list[float]) -> float:
    """Return the median of how many times as long the first took, but for two untimed ones."""
    return median(one / other for one, other in list(zip(ones, others, strict=True))[2:])


# ---- a way, in a process of its own


def work(way: str, rank: int, dtype: str) -> None:
    """Answer each line of stdin, `what tokens number`: a step on rows made from the number."""
    import torch

    torch.set_num_threads(1)
    model = model_of(way, rank, getattr(torch, dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)  # as both trainers' default
    print("> ready", flush=True)
    for line in sys.stdin:
        what, tokens, number = line.split()
        ids = torch.randint(
            VOCABULARY, (int(tokens) // ROW, ROW), generator=torch.Generator().manual_seed(int(number))
        )
        answer = ANSWERS[what](model, ids, optimizer)
        print(f"> {json.dumps(answer)}", flush=True)


def model_of(way: str, rank: int, dtype: Any) -> Any:
    """Return a Qwen3 of random weights with LoRA on attention and experts, in float32; B is not zero. dtype:
    of its base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from qwenlora.trainer.model.fused_experts import fuse_experts

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, use_cache=False, attn_implementation="eager")
    config._experts_implementation = "eager" if way == LOOP else "grouped_mm"
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(Qwen3MoeForCausalLM(config).to(dtype), lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert way != OURS or fuse_experts(model) == (SIZES["num_hidden_layers"], 0)
    model.enable_input_require_grads()  # the lowest layer costs as much as the others
    return model.train()


def step(model: Any, ids: Any, optimizer: Any) -> dict[str, float]:
    """Train a step."""
    import torch

    started = time.process_time()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return Step(time.process_time() - started, loss.item(), norm.item())._asdict()


def alone(model: Any, ids: Any, _: Any) -> dict[str, float]:
    """Compute the experts of a layer forward and backward, on rows that choose them at random."""
    import torch

    tokens, hidden = ids.numel(), SIZES["hidden_size"]
    draw = torch.Generator().manual_seed(int(ids.sum()))
    dtype = model.get_input_embeddings().weight.dtype
    x, gradient = torch.randn(2, tokens, hidden, generator=draw).to(dtype)
    rates = torch.rand(tokens, SIZES["num_experts"], generator=draw).to(dtype)
    shares = rates.topk(SIZES["num_experts_per_tok"], -1)
    x, given = x.requires_grad_(), shares.values.requires_grad_()
    model.zero_grad()
    experts = model.base_model.model.model.layers[1].mlp.experts
    started = time.process_time()
    experts(x, shares.indices, given).backward(gradient)
    return {"cpu_s": time.process_time() - started}


def products(model: Any, ids: Any, optimizer: Any) -> dict[str, float]:
    """Compute the matrix products of alone(), and nothing else."""
    from qwenlora.trainer.model import fused_experts

    real, wanted = fused_experts._products, []

    def keep(rows: Any, matrices: Any, ends: Any) -> Any:
        wanted.append((rows, matrices, ends))
        return real(rows, matrices, ends)

    fused_experts._products = keep
    alone(model, ids, optimizer)
    fused_experts._products = real
    started = time.process_time()
    for each in wanted:
        real(*each)
    return {"cpu_s": time.process_time() - started}


def peak(model: Any, ids: Any, optimizer: Any) -> dict[str, float]:
    """Return the bytes of host memory that a step needs above what is there before it."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    step(model, ids, optimizer)
    return {"bytes": memory("VmHWM") - before}


def memory(key: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[key].split()[0])


def count(model: Any, ids: Any, optimizer: Any) -> dict[str, float]:
    """Return the FLOPs that torch counts in a step, and the useful ones."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from qwenlora.plan.flops import flops
    from qwenlora.trainer.model.work import work_of

    def of_grouped(left: Any, right: Any, *_: Any, **options: Any) -> int:
        # [rows, in] x [experts, in, out]; or [out, rows] x [rows, in], which makes [experts, out, in]
        return int(2 * left[0] * left[1] * right[-1])

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: of_grouped})
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.zero_grad()
    useful = flops(work_of(model, model.config), np.full(len(ids), ROW), ids.numel())
    return {"flops": counter.get_total_flops(), "useful": useful}


ANSWERS = {"step": step, "alone": alone, "products": products, "flops": count, "peak": peak}


if __name__ == "__main__":
    main()
