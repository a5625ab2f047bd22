"""A plan as a person reads it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenlora.configs.combinations import SHARDED
from qwenlora.plan.measured import Rates
from qwenlora.plan.plan import FILES_PER_CHECKPOINT, STRATEGIES, Length, Plan, Way
from qwenlora.plan.speed import Case
from qwenlora.run.disk import free_bytes, free_files
from qwenlora.run.format import count, duration, number, size

WIDTH = 14
# on a GPU in GB: all, the base and what is gathered of it, the adapter with gradients and optimizer, a
# micro-batch's activations and logits, CUDA's own; and layers whose activations are computed again
MEMORY = ("fit", "GB", "base", "adapter", "tokens", "CUDA", "again")
TIME = ("s/step", "tokens/s", "GB sent", "links leave")
# a reader needs to know how far to trust a number
TRUST = (
    "numbers and bytes on disk are exact; memory is a formula, as a rule within a tenth; time is one that"
    " published runs calibrate, as a rule within a fifth (docs/planning.md)"
)
FLOAT32 = "; here it is that of 16 bits, and float32 takes 2 to 16 times as long"


def show(plan: Plan, case: Case, source: str, console: Console) -> None:
    """Print a plan. source: of the base's shape."""
    for name, line in _given(case, source):
        console.print(f"{name:{WIDTH}}{line}", soft_wrap=True)
    if plan.refusal:
        console.print(f"{'refused':{WIDTH}}{plan.refusal}; below for the recommended one", soft_wrap=True)
    console.print()
    console.print(_table(plan.ways, MEMORY, _memory))
    console.print()
    console.print(_table([way for way in plan.ways if way.memory], TIME, _time))
    for way in plan.ways:
        if way.why:
            console.print(f"{way.name}: {way.why}", soft_wrap=True, style="dim")
    console.print()
    for name, line in (*_corrections(case), *_follows(plan, case)):
        console.print(f"{name:{WIDTH}}{line}", soft_wrap=True)


def _given(case: Case, source: str) -> list[tuple[str, str]]:
    of, rows, machine, lora = case.parameters, case.rows, case.machine, case.config.lora
    active = f", {_numbers(of.active)} of them for a token" if of.active < of.total else ""
    how = "as they were counted" if rows.counted else "guessed from their texts"
    unit = f"packs of {case.config.data.max_length:,} tokens" if case.is_packed else "rows"
    link = f"NVLink {case.gpu.nvlink:.0f} GB/s" if case.gpu.nvlink else f"PCIe {case.gpu.pcie:.0f} GB/s"
    link = f", {link}" if machine.gpus else ""
    network = f", {case.links.network / 1e9:.0f} GB/s between nodes" if machine.nodes > 1 else ""
    kind = "GPUs" if machine.gpus else "CPU"
    gpus = f"{count(machine.nodes, 'node')} x {machine.processes} {case.gpu.name}"
    measured = f"; calibrated: {rates_in_words(case.rates)}" if case.rates else ""
    base, numbers = case.config.model.name_or_path, _numbers(of.total)
    learnt = f"{rows.trained / rows.tokens:.0%} trained"
    found = f"{rows.rows:,} an epoch, {rows.tokens:,} tokens ({learnt}), {how}"
    if rows.missing:
        found = f"not here, so each counts data.max_length={rows.mean:,.0f} tokens: {rows.missing}"
    return [
        ("base", f"{base}, {numbers} numbers{active}, from {source}"),
        ("adapter", f"{of.trainable:,} trained numbers (r {lora.r}), {size(4 * (of.trainable + of.begun))}"),
        ("rows", found),
        (kind, f"{gpus} of {size(case.gpu.bytes)}{link}{network}{measured}"),
        ("step", f"{case.config.train.global_batch_size} {unit}"),
    ]


def _numbers(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"


def rates_in_words(rates: Rates) -> str:
    """Return what was measured of a device."""
    products = (f"{dtype} {number(flops / 1e12)} TFLOP/s" for dtype, flops in rates.products.items())
    link = [f"link {number(rates.link / 1e9)} GB/s"] if rates.link else []
    return ", ".join([*products, f"memory {number(rates.memory / 1e9)} GB/s", *link])


def _corrections(case: Case) -> Iterator[tuple[str, str]]:
    """Yield by how much earlier runs correct the formulas."""
    for name in STRATEGIES:
        if (by := case.correction(name)).runs:
            factors = f"memory x {by.memory:.2f}, time x {by.time:.2f}"
            yield "corrected", f"{name} by {count(by.runs, 'run')} on {case.gpu.name}: {factors}"


def _table(ways: list[Way], names: tuple[str, ...], cells: Callable[[Way], list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("strategy", *names):
        table.add_column(name, no_wrap=True, justify="left" if name in ("strategy", "fit") else "right")
    for way in ways:
        table.add_row(way.name, *cells(way))
    return table


def _memory(way: Way) -> list[str]:
    """Return the GB of a GPU and their parts."""
    memory = way.memory
    if memory is None:
        return [way.fit]
    base, tokens = memory.weights + memory.gathered, memory.activations + memory.logits
    parts = (memory.total, base, memory.trained, tokens, memory.reserve)
    return [way.fit, *(f"{part / 1e9:.1f}" for part in parts), str(way.recomputed)]


def _time(way: Way) -> list[str]:
    if way.memory is None:
        return []
    sent = f"{way.sent / 1e9:.1f}"
    return [f"{way.step_s:.2f}", f"{way.tokens_s:,.0f}", sent, f"{way.efficiency:.0%}"]


def _follows(plan: Plan, case: Case) -> list[tuple[str, str]]:
    way, length = plan.recommended, plan.length
    trust = TRUST + FLOAT32 * (case.config.model.dtype == "float32" and case.rates is None)
    if way is None:
        return [("nothing fits", plan.instead), ("trust", trust)]
    lines = [("recommended", f"{_settings(way, case)}: {_why(plan, way)}")]
    if length is not None:
        lines.append(("run", _of_run(length)))
    if plan.scaling is not None:
        lines.append(("nodes", _of_nodes(plan.scaling, case.machine.nodes)))
    return [*lines, ("checkpoints", _checkpoints(plan, case)), ("trust", trust)]


def _of_run(length: Length) -> str:
    run = f"{count(length.steps, 'step')} in {duration(3600 * length.hours)}"
    run += f" = {length.gpu_hours:,.1f} GPU hours"
    return f"{run}, {count(length.attempts, 'job')} by the time limit" if length.attempts else run


def _settings(way: Way, case: Case) -> str:
    settings = [f"strategy.name={way.strategy}"]
    if way.strategy in SHARDED and way.shard_group == "node":
        settings.append("strategy.shard_group=node")
    if way.per_device != case.config.train.per_device_train_batch_size:
        settings.append(f"train.per_device_train_batch_size={way.per_device}")
    return " ".join(settings)


def _why(plan: Plan, way: Way) -> str:
    fitting = sum(each.fit == "fits" for each in plan.ways)
    first = "the only one that fits" if fitting == 1 and way.per_device == 1 else "the fastest that fits"
    room = f", {way.tokens_s:,.0f} tokens/s"
    return f"{first}{room}"


def _of_nodes(scaling: float, nodes: int) -> str:
    speed = f"{nodes} nodes are {scaling * nodes:.2f} times as fast as one"
    return speed if scaling > 0.7 else f"{speed}, and cost {1 / scaling:.1f} times as many GPU hours"


def _checkpoints(plan: Plan, case: Case) -> str:
    folder = Path(case.config.run_dir).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = free_bytes(there)
    each = f"{size(plan.checkpoint)} each"
    if not plan.kept:
        return f"{each}, all of them stay (train.save_total_limit: null); {size(free)} are free in {there}"
    together = plan.kept * plan.checkpoint
    files, more = free_files(there), plan.kept * FILES_PER_CHECKPOINT
    few = f", and room for {files:,} more files (inodes), of {more:,}" if 0 < files < more else ""
    short = "; set train.save_total_limit lower, or another run_dir" if few or together > free else ""
    room = f"{size(free)} are free in {there}{few}{short}"
    return f"{each}, at most {plan.kept:,} at a time, {size(together)}; {room}"
