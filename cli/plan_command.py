"""`qwenlora plan`."""

import json
from typing import Annotated

import typer

from qwenlora.cli.arguments import ConfigFile, Overrides, screen
from qwenlora.configs import load_config
from qwenlora.configs.combinations import Machine
from qwenlora.plan import hardware, table
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.plan import make_plan
from qwenlora.plan.rows import rows_of
from qwenlora.plan.speed import Case, Links
from qwenlora.run.hardware import gpu_names

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
    as_json: Annotated[bool, typer.Option("--json", help="Numbers, in bytes and seconds.")] = False,
) -> int:
    """Say what a config needs on given GPUs, before a job waits for them: memory, time, traffic and disk
    under each strategy, and which to take. Needs no GPU and no weights."""
    loaded = load_config(config, overrides or [])
    shape, source = shape_of_base(loaded.model)
    kind = hardware.named(gpu) if gpu else _this_machines()
    per_node = gpus_per_node or loaded.launch.nproc_per_node or (1 if gpu else len(gpu_names()))
    case = Case(
        loaded,
        count(shape, loaded.lora),
        rows_of(loaded),
        Machine(nodes, per_node, per_node, kind.bytes, kind.nvlink > 0),
        kind,
        Links(kind.link, network * GIGABIT),
    )
    made = make_plan(case, timeout_min)
    if as_json:
        print(json.dumps(_numbers(case) | made.model_dump(mode="json"), indent=1))
    else:
        table.show(made, case, source, screen())
    return 0 if made.recommended else 2


def _this_machines() -> hardware.Gpu:
    """Return this machine's kind of GPU. Raises: ValueError when it has none that is known."""
    names = gpu_names()
    if names and (kind := hardware.of_driver(names[0])):
        return kind
    there = f"this machine's {names[0]} is unknown" if names else "this machine has no GPU"
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
            "rows": "counted" if case.rows.counted else "guessed",
            "memory": "formula",
            "sent": "formula",
            "step_s": "calibrated formula",
        },
    }
