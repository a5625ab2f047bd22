"""How far a plan's formulas are from published figures: 81 cells of Qwen's own table, and other frameworks'.

    python benchmarks/plan_accuracy.py            # a table; --json for numbers

benchmarks/published_qwen.csv is the table of the README of QwenLM/Qwen: A100-80G, batch 1, 8 accumulation
steps, flash attention 2, gradient checkpointing, r 64, bfloat16; memory of all GPUs together. It is not of
this project: it trains with plain transformers and peft. So logits are counted whole (12 bytes a number),
layers are peft's, Q-LoRA has 4-bit GPTQ weights, and `full` trains all numbers. What the formulas cannot know
of a method is fitted on every other cell (the first, third ... length of a model), scored on the others:
for memory the bytes of a trained whole number (LoRA(emb), full) and of a logit (Q-LoRA); for time one factor,
for `full`, which has no LoRA in its layers, the seconds that a step's optimizer takes for a number.
"""

import csv
import json
import statistics
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import need
from qwenlora.configs.schema import Config
from qwenlora.plan.bases import known
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import named
from qwenlora.plan.plan import make_plan
from qwenlora.plan.rows import RowCounts
from qwenlora.plan.shape import Shape, shape_of
from qwenlora.plan.speed import EAGER, FUSED, Case, Links, step_time

VOCABULARY = 151936
# hidden size, width of the MLP, layers, heads of the first Qwens; all heads have keys and values of their own
QWEN1 = {
    "1.8B": (2048, 5504, 24, 16),
    "7B": (4096, 11008, 32, 32),
    "14B": (5120, 13696, 40, 40),
    "72B": (8192, 24576, 80, 64),
}
RANK, ACCUMULATED = 64, 8
LOGIT_BYTES, TRAINED_BYTES = 12, 16  # before they are fitted
FACTORS = ("Q-LoRA", "LoRA(emb)", "full")  # methods whose memory has a constant of its own


class Cell(NamedTuple):
    """A cell of the table. gb: of all GPUs; seconds: of an iteration; fitted: constants are fitted on it."""

    model: str
    method: str
    nodes: int
    gpus: int
    length: int
    gb: float
    seconds: float
    fitted: bool


class Figure(NamedTuple):
    """A published figure of tokens/s on each GPU."""

    source: str
    model: str
    gpu: str
    nodes: int
    gpus: int
    length: int
    tokens_s: float


PUBLISHED = (
    Figure("NeMo AutoModel", "Qwen2.5-7B", "h100", 1, 1, 4096, 14_110),
    Figure("NeMo AutoModel", "Qwen2.5-32B", "h100", 1, 8, 4096, 2_250),
    Figure("NeMo AutoModel", "Qwen2.5-32B", "h100", 2, 8, 4096, 2_073),
    Figure("NeMo AutoModel", "Qwen3-30B-A3B", "h100", 1, 8, 4096, 4_137),
    Figure("NeMo AutoModel, experts in parallel", "Qwen3.5-35B-A3B", "h100", 1, 8, 4096, 8_740),
    Figure("torchtune, compiled", "Llama-3.1-8B", "4090", 1, 1, 2048, 3_083),
    Figure("MLPerf, FP8", "Llama-2-70B", "h100", 1, 8, 8192, 2_235),
)
LLAMAS = {
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8),
    "Llama-2-70B": (32000, 8192, 28672, 80, 64, 8),
}


def cells() -> list[Cell]:
    """Return the table."""
    found: list[Cell] = []
    seen: dict[tuple[str, ...], int] = {}
    with Path(__file__).with_name("published_qwen.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["method"], row["nodes"])
            seen[key] = seen.get(key, 0) + 1
            found.append(
                Cell(
                    row["model"],
                    row["method"],
                    int(row["nodes"]),
                    int(row["gpus_per_node"]),
                    int(row["seq_len_tokens"]),
                    float(row["memory_gb"]),
                    float(row["seconds_per_iteration"]),
                    seen[key] % 2 == 1,
                )
            )
    return found


def case_of(cell: Cell) -> Case:
    """Return what the formulas are asked for a cell."""
    hidden, width, layers, heads = QWEN1[cell.model]
    shape = dense(VOCABULARY, hidden, width, layers, heads, heads)
    world = cell.nodes * cell.gpus
    config = config_of(cell.length, global_batch_size=ACCUMULATED * world, gradient_checkpointing=True)
    if cell.method == "Q-LoRA":
        strategy = config.strategy.model_copy(update={"quantization": "nf4"})
        config = config.model_copy(update={"strategy": strategy})
    counted = count(shape, config.lora)
    # one A for queries, keys and values together
    trained = counted.trainable - 2 * RANK * hidden * layers
    gpu = named("a100-80")
    return Case(
        config,
        counted.model_copy(update={"trainable": trained}),
        RowCounts(1000, 1000 * cell.length, 1000 * cell.length, cell.length),
        Machine(cell.nodes, cell.gpus, cell.gpus, gpu.bytes, nvlink=True),
        gpu,
        Links(gpu.link, 25e9),
    )


def dense(vocabulary: int, hidden: int, width: int, layers: int, heads: int, keys: int) -> Shape:
    """Return the shape of a dense base."""
    values = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": width,
    }
    heads_of = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys}
    return shape_of(values | heads_of, "a published base")


def config_of(length: int, **train: object) -> Config:
    """Return a config with packs of a length."""
    return Config.model_validate(
        {
            "run_dir": "runs/published",
            "model": {"name_or_path": "tiny"},
            "data": {"train": "example", "max_length": length, "packing": "on"},
            "lora": {"r": RANK},
            "train": train,
        }
    )


def memory(cell: Cell, logit_bytes: float = LOGIT_BYTES, trained_bytes: float = TRAINED_BYTES) -> float:
    """Return the GB of all GPUs. trained_bytes: of a number that is trained whole."""
    case = case_of(cell)
    name = "zero3" if "ZeRO-3" in cell.method else "ddp"
    needed = need(case.config, case.sizes, name, case.machine)
    hidden, world = QWEN1[cell.model][0], case.machine.world_size
    whole = {"LoRA(emb)": 2 * VOCABULARY * hidden, "full": case.parameters.total}.get(cell.method, 0)
    adapter = 0 if cell.method == "full" else needed.trained
    logits = logit_bytes * cell.length * VOCABULARY
    # of full fine-tuning the optimizer is in parts, and the numbers themselves are the base's weights
    each = needed.total - needed.logits - needed.trained + adapter + logits + trained_bytes * whole / world
    return each * world / 1e9


def seconds(cell: Cell, constant: float) -> float:
    """Return the seconds of an iteration. constant: of the method, a factor; of `full` the seconds that the
    optimizer takes for a number."""
    case, layers = case_of(cell), case_of(cell).parameters.layers
    if cell.method == "full":  # all numbers are trained: two more FLOPs for each
        work = case.parameters.work
        assert work is not None
        trained = work.model_copy(update={"frozen": 0, "trained": work.frozen + work.trained})
        case = case._replace(parameters=case.parameters.model_copy(update={"work": trained}))
        of_optimizer = constant * case.parameters.total / case.machine.world_size  # each GPU has its part
        return of_optimizer + step_time(case, "ddp", "global", layers, FUSED).seconds
    name = "zero3" if "ZeRO-3" in cell.method else "ddp"
    return constant * step_time(case, name, "global", layers, EAGER).seconds


class Constants(NamedTuple):
    """What was fitted for a method."""

    logit_bytes: float
    trained_bytes: float
    time: float


def fit(method: str, those: list[Cell]) -> Constants:
    """Return a method's constants, fitted on its cells that are for that: medians of what each cell would
    need."""
    fitting = [cell for cell in those if cell.method == method and cell.fitted]
    logit, trained = float(LOGIT_BYTES), float(TRAINED_BYTES)
    if method == "Q-LoRA":
        logit = statistics.median(_solved(cell, "logit_bytes") for cell in fitting if cell.length >= 2048)
    elif method in FACTORS:
        trained = statistics.median(_solved(cell, "trained_bytes") for cell in fitting)
    time = statistics.median(
        _between(cell.seconds, seconds(cell, 0.0), seconds(cell, 1.0)) for cell in fitting
    )
    return Constants(logit, trained, time)


def _solved(cell: Cell, name: str) -> float:
    """Return the value of a constant with which a cell's memory comes out."""
    return _between(cell.gb, memory(cell, **{name: 0.0}), memory(cell, **{name: 1.0}))


def _between(wanted: float, at_0: float, at_1: float) -> float:
    """Return the constant with which a figure that is linear in it comes out."""
    return (wanted - at_0) / (at_1 - at_0)


def planned(figure: Figure) -> float:
    """Return the tokens/s on a GPU that a plan says for the recommended strategy."""
    if figure.model in LLAMAS:
        shape = dense(*LLAMAS[figure.model])
    else:
        shape = shape_of(known()[figure.model], figure.model)
    config = config_of(figure.length, global_batch_size=8 * figure.nodes * figure.gpus)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"r": 16})})
    gpu = named(figure.gpu)
    machine = Machine(figure.nodes, figure.gpus, figure.gpus, gpu.bytes, gpu.nvlink > 0)
    rows = RowCounts(10_000, 10_000 * figure.length, 10_000 * figure.length, figure.length)
    plan = make_plan(Case(config, count(shape, config.lora), rows, machine, gpu, Links(gpu.link, 50e9)))
    assert plan.recommended
    return plan.recommended.tokens_s / machine.world_size


def main(as_json: Annotated[bool, typer.Option("--json", help="Numbers, not a table.")] = False) -> None:
    """Print the errors of memory and time by method, and the other figures."""
    those, console = cells(), Console()
    constants = {method: fit(method, those) for method in dict.fromkeys(cell.method for cell in those)}
    scored = [cell for cell in those if not cell.fitted]
    errors = {
        cell: (
            memory(cell, constants[cell.method].logit_bytes, constants[cell.method].trained_bytes) / cell.gb
            - 1,
            seconds(cell, constants[cell.method].time) / cell.seconds - 1,
        )
        for cell in those
    }
    of_all = {
        what: {
            "scored_median": statistics.median(abs(errors[cell][i]) for cell in scored),
            "scored_worst": max(abs(errors[cell][i]) for cell in scored),
            "all_median": statistics.median(abs(error[i]) for error in errors.values()),
            "all_worst": max(abs(error[i]) for error in errors.values()),
        }
        for i, what in enumerate(("memory", "time"))
    }
    published = [(figure, planned(figure)) for figure in PUBLISHED]
    if as_json:
        facts = {method: each._asdict() for method, each in constants.items()}
        others = [figure._asdict() | {"planned": ours} for figure, ours in published]
        console.print_json(json.dumps({"errors": of_all, "constants": facts, "published": others}))
        return
    console.print(_by_method(those, errors, constants))
    for what, each in of_all.items():
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in each.items())
        console.print(f"{what}: {shown}", highlight=False)
    console.print(_others(published))


def _by_method(
    those: list[Cell], errors: dict[Cell, tuple[float, float]], constants: dict[str, Constants]
) -> Table:
    table = Table("method", "cells", "memory median", "worst", "time median", "worst", "constants", box=None)
    for method, of in constants.items():
        found = [errors[cell] for cell in those if cell.method == method]
        shown = [
            f"{pick(abs(error[i]) for error in found):.1%}"
            for i in (0, 1)
            for pick in (statistics.median, max)
        ]
        fitted = f"{1e9 * of.time:.2f} ns a number" if method == "full" else f"time x {of.time:.2f}"
        if method == "Q-LoRA":
            fitted += f", {of.logit_bytes:.1f} bytes a logit"
        elif method in FACTORS:
            fitted += f", {of.trained_bytes:.1f} bytes a number"
        table.add_row(method, str(len(found)), *shown, fitted)
    return table


def _others(published: list[tuple[Figure, float]]) -> Table:
    table = Table("published by", "model", "GPUs", "tokens/s/GPU", "planned", "ratio", box=None)
    for figure, ours in published:
        gpus = f"{figure.nodes * figure.gpus} x {figure.gpu.upper()}"
        ratio = f"{ours / figure.tokens_s:.2f}"
        table.add_row(figure.source, figure.model, gpus, f"{figure.tokens_s:,.0f}", f"{ours:,.0f}", ratio)
    return table


if __name__ == "__main__":
    typer.run(main)
