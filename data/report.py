"""What `qwenlora data check` says of prepared rows: numbers, a page in the terminal, and the same page as
HTML.

`report = of(prepared, config, packing)`, then `report.show(console)` and `report.write(path)`.
"""

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwenlora.configs.schema import Config
from qwenlora.data.order import Order
from qwenlora.data.prepared import Prepared
from qwenlora.data.sources import SideName
from qwenlora.run.records import SideCounts

BINS = 30
SIDE_NAMES: dict[SideName, str] = {"train": "training rows", "eval": "evaluation rows"}


@dataclass(frozen=True)
class Length:
    """One bar of the histogram: rows of start to end - 1 tokens. over: longer than data.max_length."""

    start: int
    end: int
    rows: int
    over: bool


@dataclass(frozen=True)
class Report:
    """All that is shown. facts, sources: (name, value) lines and table rows in the order of the page."""

    title: str
    facts: list[tuple[str, str]]
    sources: list[dict[str, Any]]
    lengths: list[Length]
    max_length: int
    problems: list[str]
    refusal: str

    def show(self, console: Console) -> None:
        """Print the page."""
        console.print(Text(self.title, style="bold"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        columns = {"source": "left", "rows": "right", "bad": "right", "tokens": "right", "trained": "right"}
        for name, side in columns.items():
            table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
        for source in self.sources:
            table.add_row(*(Text(str(source[name])) for name in columns))
        console.print(table)
        facts = Table(box=None, pad_edge=False, show_header=False)
        facts.add_column(style="cyan", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in self.facts:
            facts.add_row(name, Text(value))
        console.print(facts)
        if self.lengths:
            console.print(Text("training rows by tokens", style="bold"))
            console.print(self._histogram())
        for problem in self.problems:
            console.print(Text("warning: ", style="yellow").append(problem, style="default"), soft_wrap=True)
        if self.refusal:
            console.print(Text(f"would be refused: {self.refusal}", style="red"), soft_wrap=True)
        else:
            console.print(Text("ready to train", style="green"))

    def _histogram(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False, expand=True)
        table.add_column(justify="right", no_wrap=True, style="cyan")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(ratio=1)
        most = max((length.rows for length in self.lengths), default=1)
        drawn = empty = False
        for length in self.lengths:
            if not length.rows:
                if not empty:
                    table.add_row("...", "", "")
                empty = True
                continue
            empty = False
            if length.over and not drawn:
                table.add_row("", "", Text(f"--- data.max_length={self.max_length} ---", style="red"))
                drawn = True
            bar = Bar(most, 0, length.rows, color="red" if length.over else "green")
            table.add_row(f"{length.start:,}-{length.end - 1:,}", f"{length.rows:,}", bar)
        if not drawn:
            table.add_row(
                "", "", Text(f"--- data.max_length={self.max_length}: no row is longer ---", style="dim")
            )
        return table

    def write(self, path: Path) -> None:
        """Write the page as one HTML file that needs nothing else."""
        text = resources.files("qwenlora.data").joinpath("page.html").read_text(encoding="utf-8")
        page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
        most = max((length.rows for length in self.lengths), default=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.render(report=self, most=most), encoding="utf-8")


def of(prepared: Prepared, config: Config, tokenizer: Any, *, packing: bool, notes: list[str]) -> Report:
    """Return the report on prepared rows. packing: whether this run packs them; notes: further warnings."""
    refusal = ""
    try:
        prepared.refuse(config.data, tokenizer)
    except ValueError as error:
        refusal = str(error)
    facts = []
    for side, name in SIDE_NAMES.items():
        if side in prepared.counts:
            facts += _side(name, prepared.counts[side], config)
    train = prepared.side("train")
    if train is not None and len(train):
        facts += _batches(prepared, config, packing=packing)
    overlap = prepared.facts["overlap"]["rows"]
    if "eval" in prepared.counts:
        facts.append(
            ("in both", f"{overlap:,} evaluation rows are training rows, too" if overlap else "no row")
        )
    facts.append(("preparation", _preparation(prepared.facts)))
    lengths = (
        np.load(prepared.folder / "train" / "whole.npy")
        if "train" in prepared.counts
        else np.empty(0, np.int64)
    )
    return Report(
        title=f"{config.run_dir}: {prepared.facts['read']:,} rows",
        facts=facts,
        sources=[_source(prepared, number) for number in range(len(prepared.sources))],
        lengths=histogram(lengths, config.data.max_length),
        max_length=config.data.max_length,
        problems=notes,
        refusal=refusal,
    )


def histogram(lengths: npt.NDArray[np.integer], max_length: int) -> list[Length]:
    """Return about BINS bars over all lengths, one border of which is max_length, when it is among them."""
    if not len(lengths):
        return []
    longest = int(lengths.max())
    width = _round(longest / BINS)
    if longest > max_length:  # a bar is either within or beyond
        width = max(1, max_length // max(1, round(max_length / width)))
    edges = list(range(0, longest + width + 1, width))
    if longest > max_length:
        edges = sorted({edge for edge in edges if abs(edge - max_length - 1) >= width / 2} | {max_length + 1})
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] + 0.5])
    bars = [
        Length(start, end, rows, start > max_length)
        for start, end, rows in zip(edges, edges[1:], counts.tolist(), strict=False)
    ]
    first = next(number for number, bar in enumerate(bars) if bar.rows)
    last = max(number for number, bar in enumerate(bars) if bar.rows)
    return _shortened(bars[first : last + 1])


def _shortened(bars: list[Length]) -> list[Length]:
    """Return bars with a long tail of them made into one: outliers must not push the others off the page."""
    if len(bars) <= 2 * BINS:
        return bars
    rest = bars[2 * BINS - 1 :]
    over = [bar for bar in rest if bar.over]
    within = [bar for bar in rest if not bar.over]
    joined = [
        Length(part[0].start, part[-1].end, sum(bar.rows for bar in part), part[0].over)
        for part in (within, over)
        if part
    ]
    return bars[: 2 * BINS - 1] + joined


def _round(width: float) -> int:
    """Return the next of 1, 2, 5, 10, 20 ... that is not below width."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(int(step * power) for step in (1, 2, 5, 10) if step * power >= width)


def _source(prepared: Prepared, number: int) -> dict[str, Any]:
    source, counts = prepared.sources[number], prepared.facts["sources"][number]
    tokens = counts.get("tokens", 0)
    weight = f" x {source.weight:g}" if source.weight != 1 else ""
    return {
        "source": f"{source.side}: {source.name}{weight}",
        "rows": f"{counts.get('read', 0):,}",
        "bad": f"{counts.get('bad', 0):,}",
        "tokens": f"{tokens:,}",
        "trained": f"{counts.get('trained_tokens', 0) / tokens:.1%}" if tokens else "-",
    }


def _side(name: str, counts: SideCounts, config: Config) -> list[tuple[str, str]]:
    tokens = counts.tokens
    lines = [
        (
            name,
            f"{counts.rows:,} of {counts.read_rows:,} read, {counts.duplicates:,} of these twice; {tokens:,}"
            f" tokens, {counts.trained_tokens / max(tokens, 1):.1%} of them trained",
        )
    ]
    if counts.overlength:
        done = [f"{count:,} {what}" for what, count in counts.cut.items()]
        lost = [f"{counts.lost_replies:,} replies not trained"] if counts.lost_replies else []
        what = ", ".join([*done, *lost]) if config.data.overlength != "error" else "refused"
        lines.append(
            (
                "over-length",
                f"{counts.overlength:,} of {counts.read_rows:,}, the longest {counts.longest_read:,}: {what}",
            )
        )
    return lines


def _batches(prepared: Prepared, config: Config, *, packing: bool) -> list[tuple[str, str]]:
    train, size = prepared.side("train"), config.train.per_device_train_batch_size
    assert train is not None, "asked for with training rows only"
    packs, batch = prepared.packs(), config.train.global_batch_size
    lengths = train.lengths.astype(np.int64)
    order = Order(lengths, batch, size, config.train.seed, packs if packing else None, config.data.max_length)
    total = int(lengths.sum())
    fill = total / (len(packs) * config.data.max_length)
    shuffled = (
        lengths[order.epoch(0)]
        if not packing
        else lengths[np.random.RandomState(0).permutation(len(lengths))]
    )
    random = _padding([shuffled[start : start + size] for start in range(0, len(shuffled), size)])
    ours = _padding(
        np.array([int(lengths[unit].sum()) for unit in micro])
        for micro in map(list, order.micro_batches(0, 1, 0))
        if micro
    )
    unit = "packs" if packing else "rows"
    tokens = min(batch, order.units) * total // order.units
    return [
        (
            "packs",
            f"{len(packs):,} of at most {config.data.max_length:,} tokens, {fill:.2%}"
            f" full{'' if packing else ' (data.packing is off here)'}",
        ),
        (
            "padding",
            f"{ours:.1%} of what is computed; with rows in random order, {size} at once: {random:.1%}",
        ),
        ("steps", f"{order.steps_per_epoch:,} an epoch, of {batch} {unit}, about {tokens:,} tokens each"),
    ]


def _padding(batches: Any) -> float:
    """Return the share of padding when each batch of lengths is padded to its longest."""
    used = computed = 0
    for lengths in batches:
        used += int(lengths.sum())
        computed += int(lengths.max()) * len(lengths)
    return 1 - used / max(computed, 1)


def _preparation(facts: dict[str, Any]) -> str:
    processes = facts["processes"]
    return (
        f"{facts['seconds']:.1f} s, {facts['read'] / max(facts['seconds'], 0.001):,.0f} rows/s with"
        f" {processes} process{'es' * (processes > 1)}, at most {facts['peak_memory_bytes'] / 1e6:,.0f} MB of"
        " memory"
    )
