"""`qwenlora plan`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from qwenlora.adapter.deferred import Deferred
from qwenlora.cli.arguments import ConfigFile, Overrides, screen
from qwenlora.configs import load_config
from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import tokens_at_once
from qwenlora.plan import hardware, table
from qwenlora.plan.bases import shape_of_base, values_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.flops import flops
from qwenlora.plan.plan import Plan, Way, make_plan, with_micro_batch
from qwenlora.plan.rows import rows_of
from qwenlora.plan.scale import FAILURES, Scale, scales
from qwenlora.plan.scale import plot as plot_scales
from qwenlora.plan.scale import show as show_scales
from qwenlora.plan.speed import Case, Links
from qwenlora.run.format import size
from qwenlora.run.hardware import gpus_seen

if TYPE_CHECKING:
    from qwenlora.trainer import trace as tracing
    from qwenlora.trainer.trace import Traced
else:
    tracing = Deferred("qwenlora.trainer.trace")

GIGABIT = 1e9 / 8  # bytes


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of GPU, as h100 or a100-40. Default: this machine's.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of a node. Default: launch.nproc_per_node, else this machine's."),
    ] = None,
    network: Annotated[float, typer.Option(min=1, help="Gb/s of a GPU to other nodes.")] = 400,
    timeout_min: Annotated[int | None, typer.Option(min=2, help="Minutes that a job may take.")] = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Compare with the real model, run on tensors without numbers (needs torch)."
        ),
    ] = False,
    scale: Annotated[
        str | None, typer.Option(metavar="GPUS,GPUS", help="Speed and goodput on so many GPUs, as 8,64,512.")
    ] = None,
    failures: Annotated[float, typer.Option(min=0, help="With --scale: of a node, an hour.")] = FAILURES,
    plot: Annotated[Path | None, typer.Option(help="With --scale: draw it, as scale.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers, in bytes and seconds.")] = False,
) -> int:
    """Say what a config needs on given GPUs, before a job waits for them: memory, time, traffic and disk
    under each strategy, and which to take. Needs no GPU and no weights."""
    loaded = load_config(config, overrides or [])
    shape, source = shape_of_base(loaded.model)
    kind = hardware.named(gpu) if gpu else _this_machines()
    per_node = gpus_per_node or loaded.launch.nproc_per_node or (1 if gpu else len(gpus_seen()))
    case = Case(
        loaded,
        count(shape, loaded.lora),
        rows_of(loaded),
        Machine(nodes, per_node, per_node, kind.bytes, kind.nvlink > 0),
        kind,
        Links(kind.link, network * GIGABIT),
    )
    if scale:
        if case.rows.missing:
            raise ValueError(f"--scale needs the rows of a run, by which it is so long: {case.rows.missing}")
        return _scale(scales(case, _sizes(scale), failures), case, plot, as_json=as_json)
    made = make_plan(case, timeout_min)
    traced = _trace(case, made) if trace else None
    if as_json:
        more = {"traced": traced._asdict()} if traced else {}
        print(json.dumps(_numbers(case) | made.model_dump(mode="json") | more, indent=1))
    else:
        table.show(made, case, source, screen())
        for line in _beside(case, made, traced) if traced else ():
            screen().print(line, soft_wrap=True)
    return 0 if made.recommended else 2


def _sizes(text: str) -> list[int]:
    """Return the numbers of GPUs that a user named. Raises: ValueError."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--scale {text}: expected numbers of GPUs, as 8,64,512")
    return sizes


def _scale(runs: list[Scale], case: Case, file: Path | None, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([run.model_dump() for run in runs], indent=1))
    else:
        show_scales(runs, case, screen())
    if file:
        plot_scales(runs, file)
    return 0 if any(run.way for run in runs) else 2


def _this_machines() -> hardware.Gpu:
    """Return this machine's kind of GPU. Raises: ValueError when it has none that is known."""
    if kind := hardware.of_this_machine():
        return kind
    seen = gpus_seen()
    there = f"this machine's {seen[0].name} is unknown" if seen else "this machine has no GPU"
    raise ValueError(f"{there}: name the kind that the run will have, as --gpu h100; known are {_kinds()}")


def _kinds() -> str:
    return ", ".join(hardware.gpus())


def _numbers(case: Case) -> dict[str, object]:
    """Return what a plan follows from."""
    return {
        "gpu": case.gpu.name,
        "nodes": case.machine.nodes,
        "gpus_per_node": case.machine.gpus,
        "parameters": case.parameters.model_dump(mode="json"),
        "rows": case.rows._asdict(),
        "how": {
            "parameters": "exact",
            "checkpoint": "exact",
            "rows": "missing" if case.rows.missing else "counted" if case.rows.counted else "guessed",
            "memory": "formula",
            "sent": "formula",
            "step_s": "calibrated formula",
        },
    }


def _way(made: Plan) -> Way:
    """Return the way that is traced: the recommended one, else the one that needs least."""
    return made.recommended or min(
        (way for way in made.ways if way.memory), key=lambda way: way.memory.total if way.memory else 0
    )


def _trace(case: Case, made: Plan) -> "Traced":
    way = _way(made)
    at = with_micro_batch(case, way.per_device)
    values, _ = values_of_base(case.config.model)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed
    return tracing.trace(
        values,
        case.config.lora,
        tokens=tokens_at_once(at.config, at.sizes),
        trained=round(tokens_at_once(at.config, at.sizes) * case.rows.trained / case.rows.tokens),
        recomputed=way.recomputed,
        sharded_by_deepspeed=way.strategy == "zero3",
    )


def _beside(case: Case, made: Plan, traced: "Traced") -> list[str]:
    """Return what was traced, beside the formulas."""
    way = _way(made)
    at = with_micro_batch(case, way.per_device)
    memory, work = way.memory, case.parameters.work
    assert memory is not None
    assert work is not None
    tokens = tokens_at_once(at.config, at.sizes)
    useful = flops(work, np.array([tokens]), round(tokens * case.rows.trained / case.rows.tokens))
    weights = 2 * case.parameters.total + 4 * case.parameters.trainable
    return [
        "",
        f"traced in {traced.seconds:.0f} s: a micro-batch of {tokens:,} tokens under {way.name},"
        f" {way.recomputed} layers computed again; in brackets by formula",
        f"{'weights':{table.WIDTH}}{size(traced.weights)} in 16 bits ({size(weights)})",
        f"{'tokens':{table.WIDTH}}{size(traced.kept)} kept for the backward ({size(memory.activations)}),"
        f" {size(traced.peak)} at the peak ({size(memory.activations + memory.logits)})",
        f"{'operations':{table.WIDTH}}{traced.flops / 1e12:,.1f} TFLOP ({useful / 1e12:,.1f} useful)",
    ]
