"""How a run scales: its speed, time and goodput on more and more GPUs, with the same global batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from qwenlora.plan.plan import START_S, best_way, hours_of, steps_of
from qwenlora.plan.speed import Case
from qwenlora.run.format import duration
from qwenlora.run.snapshots import EVERY_S

# of a node and hour: 419 interruptions of 2,048 nodes in 54 days (Llama 3, arXiv 2407.21783, table 5)
FAILURES = 1.6e-4


class Scale(BaseModel, frozen=True):
    """A run on so many GPUs. way: strategy and micro-batch, empty if none fits, or the batch has fewer packs
    than there are GPUs; efficiency: its speed on each GPU, relative to the fewest GPUs; start: the share of
    the time that a start takes; goodput: the share that goes into steps that count, starts and failures
    considered."""

    gpus: int
    way: str = ""
    tokens_s: float = 0.0
    efficiency: float = 0.0
    hours: float = 0.0
    start: float = 0.0
    goodput: float = 0.0


def scales(case: Case, sizes: Sequence[int], failures: float = FAILURES) -> list[Scale]:
    """Return a run on each number of GPUs. failures: of a node, an hour. Raises: ValueError for a number that
    is no multiple of a node's GPUs, and above them."""
    return list(_scales(case, sorted(set(sizes)), failures))


def _scales(case: Case, sizes: Sequence[int], failures: float) -> Iterator[Scale]:
    first = 0.0  # tokens/s of a GPU, on the fewest that the run fits
    for gpus in sizes:
        per_node = min(gpus, case.machine.processes)
        nodes, rest = divmod(gpus, per_node)
        if rest:
            raise ValueError(f"--scale {gpus}: expected a multiple of a node's {per_node} GPUs, or fewer")
        machine = case.machine._replace(nodes=nodes, processes=per_node, gpus=per_node)
        way = best_way(case._replace(machine=machine))
        if way is None:
            yield Scale(gpus=gpus)
            continue
        first = first or way.tokens_s / gpus
        hours = hours_of(case, way)
        yield Scale(
            gpus=gpus,
            way=f"{way.name} x {way.per_device}",
            tokens_s=way.tokens_s,
            efficiency=way.tokens_s / gpus / first,
            hours=hours,
            start=START_S / (3600 * hours + START_S),
            goodput=_goodput(case, hours, way.step_s, nodes, failures),
        )


def kept_share(save_s: float, restart_s: float, failures: float) -> float:
    """Return the share of the time that goes into steps that count, 1 - (T / 2 + R) / M: T seconds between
    saves, R of a restart, M between failures. failures: of the job, an hour."""
    return max(0.0, 1 - (save_s / 2 + restart_s) * failures / 3600)


def _goodput(case: Case, hours: float, step_s: float, nodes: int, failures: float) -> float:
    """Return the share of a run's time in steps that count, less the first start. Snapshots in memory count
    as saves, where another node has one, too. failures: of a node, an hour."""
    train, memory_steps = case.config.train, case.config.checkpoint.memory_steps
    steps = {"steps": train.save_steps or 0, "epoch": steps_of(case) / train.num_train_epochs}
    between = steps.get(train.save_strategy, steps_of(case)) * step_s
    if memory_steps != 0 and nodes > 1:
        kept = max(step_s, EVERY_S) if memory_steps is None else memory_steps * step_s
        between = min(between, kept)
    return kept_share(between, START_S, failures * nodes) * 3600 * hours / (3600 * hours + START_S)


def show(runs: Sequence[Scale], case: Case, console: Console) -> None:
    """Print the runs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPUs", "strategy", "tokens/s", "efficiency", "run", "start", "goodput"):
        table.add_column(name, no_wrap=True, justify="left" if name == "strategy" else "right")
    for run in runs:
        table.add_row(*_cells(run))
    console.print()
    console.print(table)
    if any(not run.way for run in runs):
        packs = case.config.train.global_batch_size
        console.print(
            f"-: does not fit, or train.global_batch_size={packs} is less than a pack or row a GPU",
            soft_wrap=True,
        )


def _cells(run: Scale) -> list[str]:
    if not run.way:
        return [f"{run.gpus:,}", "-"]
    return [
        f"{run.gpus:,}",
        run.way,
        f"{run.tokens_s:,.0f}",
        f"{run.efficiency:.0%}",
        duration(3600 * run.hours),
        f"{run.start:.1%}",
        f"{run.goodput:.1%}",
    ]


def plot(runs: Sequence[Scale], file: Path) -> None:
    """Draw speed and goodput by GPUs, on logarithmic axes. file: .png or .svg."""
    from matplotlib.figure import Figure  # late: half a second, which only this needs

    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    speed, shares = figure.subplots(1, 2)
    there = [run for run in runs if run.way]
    gpus = [run.gpus for run in there]
    ideal = [there[0].tokens_s / there[0].gpus * count for count in gpus] if there else []
    speed.plot(gpus, ideal, linestyle="--", color="0.6", label="in proportion")
    speed.plot(gpus, [run.tokens_s for run in there], marker="o", label="planned")
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s")
    for name in ("efficiency", "goodput"):
        shares.plot(gpus, [getattr(run, name) for run in there], marker="o", label=name)
    shares.set(xscale="log", xlabel="GPUs", ylim=(0, 1.05))
    for axes in (speed, shares):
        axes.legend(frameon=False)
        axes.set_xticks(gpus, [f"{count:,}" for count in gpus], minor=False)
        axes.minorticks_off()
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise ValueError(f"--plot {file} cannot be written: {error.strerror}") from error
