"""`qwenlora plan`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from qwenlora.adapter.deferred import Deferred
from qwenlora.cli.arguments import Overrides, screen
from qwenlora.configs import Config, load_config
from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import tokens_at_once
from qwenlora.plan import hardware, measured, table
from qwenlora.plan.adapter import check_divided
from qwenlora.plan.bases import shape_of_base, values_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.flops import flops
from qwenlora.plan.measured import Measured, device_of
from qwenlora.plan.plan import STRATEGIES, Plan, Way, make_plan, with_micro_batch
from qwenlora.plan.rows import rows_of
from qwenlora.plan.scale import FAILURES, scales
from qwenlora.plan.scale import plot as plot_scales
from qwenlora.plan.scale import show as show_scales
from qwenlora.plan.speed import Case, Links
from qwenlora.run.format import size
from qwenlora.run.hardware import cpu_name, gpus_seen, memory_mib

if TYPE_CHECKING:
    from qwenlora.trainer import calibrate as calibration
    from qwenlora.trainer import trace as tracing
    from qwenlora.trainer.trace import Traced
else:
    calibration, tracing = Deferred("qwenlora.trainer.calibrate"), Deferred("qwenlora.trainer.trace")

GIGABIT = 1e9 / 8  # bytes


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/tiny.yaml.")
    ] = None,
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
        bool, typer.Option("--trace", help="Compare with the real model, on tensors without numbers (torch).")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure how fast this machine is, in under 20 s (needs torch); plans use it from then on.",
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
    under each strategy, and which to take. Needs no GPU and no weights.

    Example: qwenlora plan my.yaml --gpu h100 --gpus-per-node 8
    """
    if calibrate:
        _calibrate()
    if config is None:
        if calibrate:
            return 0
        raise ValueError("name a config, as configs/tiny.yaml; --calibrate alone needs none")
    _check_options(scale, plot, trace=trace)
    loaded = load_config(config, overrides or [])
    case, source = _case(loaded, gpu, nodes, gpus_per_node, network)
    if scale is not None:
        return _scale(case, _sizes(scale), failures, plot, as_json=as_json)
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


def _check_options(scale: str | None, plot: Path | None, *, trace: bool) -> None:
    """Refuse options that do nothing together. Raises: ValueError."""
    if trace and scale is not None:
        raise ValueError("--trace and --scale: one of them at a time")
    if plot and scale is None:
        raise ValueError(f"--plot {plot} draws what --scale computes, as --scale 8,64,512")


def _calibrate() -> None:
    """Measure this machine, keep what was found, and say it, where it is no part of --json."""
    name, rates = calibration.calibrate()
    kept = measured.file()
    try:
        measured.change(lambda file: file.with_device(name, rates))
        where = f"kept in {kept}"
    except OSError as error:
        where = f"not kept, since {kept} cannot be written: {error.strerror}"
    print(f"{name}: {table.rates_in_words(rates)}; {where}", file=sys.stderr)


def _case(
    config: Config, gpu: str | None, nodes: int, gpus_per_node: int | None, network: float
) -> tuple[Case, str]:
    """Return what is planned, and where the shape of the base is from. Raises: ValueError."""
    shape, source = shape_of_base(config.model)
    check_divided(config, shape.num_experts)
    file, seen = measured.read(), gpus_seen()
    kind = hardware.named(gpu) if gpu else _this_machines(file)
    gpus = 1 if gpu else len(seen)
    processes = gpus_per_node or config.launch.nproc_per_node or gpus or 1
    if not gpus:  # processes on a CPU share its memory
        kind = kind.model_copy(update={"memory_mib": kind.memory_mib / processes})
    machine = Machine(nodes, processes, processes if gpus else 0, kind.bytes, kind.nvlink > 0)
    links = Links(kind.link, network * GIGABIT)
    return Case(config, count(shape, config.lora), rows_of(config), machine, kind, links, file), source


def _sizes(text: str) -> list[int]:
    """Return the numbers of GPUs that a user named. Raises: ValueError."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--scale {text}: expected numbers of GPUs, as 8,64,512")
    return sizes


def _scale(case: Case, sizes: list[int], failures: float, file: Path | None, *, as_json: bool) -> int:
    if case.rows.missing:
        raise ValueError(f"--scale needs the rows of a run, by which it is so long: {case.rows.missing}")
    runs = scales(case, sizes, failures)
    if file:
        plot_scales(runs, file)
    if as_json:
        print(json.dumps([run.model_dump() for run in runs], indent=1))
    else:
        show_scales(runs, case, screen())
    return 0 if any(run.way for run in runs) else 2


def _this_machines(file: Measured) -> hardware.Gpu:
    """Return this machine's kind of GPU or, without one, its CPU, if that was calibrated. Raises: ValueError
    for what is not known."""
    if kind := hardware.of_this_machine():
        return kind
    seen = gpus_seen()
    name, mib = (seen[0].name, seen[0].mib) if seen else (cpu_name(), memory_mib())
    if rates := file.devices.get(name):
        return device_of(name, mib, rates)
    there, what = (
        (f"this machine's {name} is unknown", "it") if seen else ("this machine has no GPU", "its CPU")
    )
    raise ValueError(
        f"{there}: name the kind that the run will have, as --gpu h100, or measure {what} with --calibrate;"
        f" known are {_kinds()}"
    )


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
            "gpu": "calibrated" if case.rates else "data sheet",
        },
        "corrected": {name: by._asdict() for name in STRATEGIES if (by := case.correction(name)).runs},
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
    weights = 2 * case.parameters.total + 4 * (case.parameters.trainable + case.parameters.begun)
    return [
        "",
        f"traced in {traced.seconds:.0f} s: a micro-batch of {tokens:,} tokens under {way.name},"
        f" {way.recomputed} layers computed again; in brackets by formula",
        f"{'weights':{table.WIDTH}}{size(traced.weights)} in 16 bits ({size(weights)})",
        f"{'tokens':{table.WIDTH}}{size(traced.kept)} kept for the backward ({size(memory.activations)}),"
        f" {size(traced.peak)} at the peak ({size(memory.activations + memory.logits)})",
        f"{'operations':{table.WIDTH}}{traced.flops / 1e12:,.1f} TFLOP ({useful / 1e12:,.1f} useful)",
    ]
