"""The report of `qwenlora data check`, for the terminal (DataReport.show) and as HTML (DataReport.write)."""

import math
from collections.abc import Iterable
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

from qwenlora.configs.schema import Config, Model
from qwenlora.data.counts import PreparedIndex, SourceCounts
from qwenlora.data.order import Order
from qwenlora.data.prepared import Prepared, Side
from qwenlora.data.sources import Source
from qwenlora.run.records import SideCounts, SideName

BINS = 30
SIDE_NAMES: dict[SideName, str] = {"train": "training rows", "eval": "evaluation rows"}


@dataclass(frozen=True)
class HistogramBar:
    """A bar of the histogram: rows of start to end - 1 tokens. over: longer than data.max_length."""

    start: int
    end: int
    rows: int
    over: bool


@dataclass(frozen=True)
class SourceRow:
    """A row of the table of sources, as it is shown."""

    source: str
    rows: str
    bad: str
    tokens: str
    trained: str


@dataclass(frozen=True)
class DataReport:
    """All that the report shows, in the order of the page. lines: (name, value); lengths: the histogram."""

    title: str
    lines: list[tuple[str, str]]
    sources: list[SourceRow]
    lengths: list[HistogramBar]
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
            table.add_row(*(Text(getattr(source, name)) for name in columns))
        console.print(table)
        lines = Table(box=None, pad_edge=False, show_header=False)
        lines.add_column(style="cyan", no_wrap=True)
        lines.add_column(overflow="fold")
        for name, value in self.lines:
            lines.add_row(name, Text(value))
        console.print(lines)
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
        limit = f"data.max_length={self.max_length}"
        limit_drawn = gap_drawn = False
        for length in self.lengths:
            if not length.rows:
                if not gap_drawn:
                    table.add_row("...", "", "")
                gap_drawn = True
                continue
            gap_drawn = False
            if length.over and not limit_drawn:
                table.add_row("", "", Text(f"--- {limit} ---", style="red"))
                limit_drawn = True
            bar = Bar(most, 0, length.rows, color="red" if length.over else "green")
            table.add_row(f"{length.start:,}-{length.end - 1:,}", f"{length.rows:,}", bar)
        if not limit_drawn:
            table.add_row("", "", Text(f"--- {limit}: no row is longer ---", style="dim"))
        return table

    def write(self, path: Path) -> None:
        """Write the page as one HTML file that needs nothing else."""
        text = resources.files("qwenlora.data").joinpath("page.html").read_text(encoding="utf-8")
        page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
        most = max((length.rows for length in self.lengths), default=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.render(report=self, most=most), encoding="utf-8")


def _tokenizer_of(model: Model) -> str:
    """Return whose tokenizer the counts of tokens depend on."""
    if model.tokenizer or model.name_or_path != "tiny":
        return model.tokenizer or model.name_or_path
    return "tiny's own: it makes 1.4 to 2 times as many tokens as a Qwen's (model.tokenizer names another)"


def notes_of(config: Config, rows: Prepared) -> list[str]:
    """Return notes on the rows for the user, as cut rows, lost replies and eval rows that are trained on."""
    notes = list(rows.index.notes)
    for side, counts in rows.counts.items():
        limit = f"data.max_length={config.data.max_length} tokens"
        for what, count in counts.cut.items():
            notes.append(f"{count:,} of {counts.read_rows:,} {side} rows {what} at {limit}")
        if counts.lost_replies:
            notes.append(
                f"{counts.lost_replies:,} replies of {side} rows are not trained: with their question they"
                f" are longer than {limit}; data.split_replies: true trains them without"
            )
    if overlap := rows.index.overlap.rows:
        first = rows.place("eval", rows.index.overlap.first[0])
        notes.append(
            f"{overlap:,} of {rows.counts['eval'].read_rows:,} eval rows are trained on, too (first: {first})"
        )
    return notes


def data_report(
    prepared: Prepared, config: Config, tokenizer: Any, embeddings: int, *, packing: bool, notes: list[str]
) -> DataReport:
    """Return the report on prepared rows. embeddings: how many tokens the base has one for; packing: whether
    this run packs them; notes: further warnings."""
    refusal = ""
    try:
        prepared.refuse(config.data, tokenizer, embeddings)
    except ValueError as error:
        refusal = str(error)
    index = prepared.index
    lines = [("tokenizer", _tokenizer_of(config.model))]
    for side, name in SIDE_NAMES.items():
        if side in index.sides:
            lines += _side(name, index.sides[side], config)
    train = prepared.side("train")
    if train is not None and len(train):
        lines += _batches(prepared, train, config, packing=packing)
    if "eval" in index.sides:
        overlap = index.overlap.rows
        both = f"{overlap:,} evaluation rows are training rows, too" if overlap else "no row"
        lines.append(("in both", both))
    lines.append(("preparation", _preparation(index)))
    lengths = np.empty(0, np.int64)
    if "train" in index.sides:
        lengths = np.load(prepared.folder / "train" / "whole.npy")
    return DataReport(
        title=f"{config.run_dir}: {index.read_rows:,} rows",
        lines=lines,
        sources=[_source(*pair) for pair in zip(prepared.sources, index.sources, strict=True)],
        lengths=histogram(lengths, config.data.max_length),
        max_length=config.data.max_length,
        problems=notes,
        refusal=refusal,
    )


def histogram(lengths: npt.NDArray[np.integer], max_length: int) -> list[HistogramBar]:
    """Return about BINS bars over all lengths, each either within max_length or beyond it."""
    if not len(lengths):
        return []
    edges = _edges(int(lengths.max()), max_length)
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] + 0.5])
    bars = [
        HistogramBar(start, end, rows, start > max_length)
        for start, end, rows in zip(edges, edges[1:], counts.tolist(), strict=False)
    ]
    first = next(number for number, bar in enumerate(bars) if bar.rows)
    last = max(number for number, bar in enumerate(bars) if bar.rows)
    return _shortened(bars[first : last + 1])


def _edges(longest: int, max_length: int) -> list[int]:
    width = _round(longest / BINS)
    if longest <= max_length:
        return list(range(0, longest + width + 1, width))
    width = max(1, max_length // max(1, round(max_length / width)))
    edges = range(0, longest + width + 1, width)
    return sorted({edge for edge in edges if abs(edge - max_length - 1) >= width / 2} | {max_length + 1})


def _shortened(bars: list[HistogramBar]) -> list[HistogramBar]:
    """Return bars with a long tail joined, so that outliers do not push the others off the page."""
    if len(bars) <= 2 * BINS:
        return bars
    rest = bars[2 * BINS - 1 :]
    over = [bar for bar in rest if bar.over]
    within = [bar for bar in rest if not bar.over]
    joined = [
        HistogramBar(part[0].start, part[-1].end, sum(bar.rows for bar in part), part[0].over)
        for part in (within, over)
        if part
    ]
    return bars[: 2 * BINS - 1] + joined


def _round(width: float) -> int:
    """Return the first of 1, 2, 5, 10, 20 ... that is at least width."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(int(step * power) for step in (1, 2, 5, 10) if step * power >= width)


def _source(source: Source, counts: SourceCounts) -> SourceRow:
    weight = f" x {source.weight:g}" if source.weight != 1 else ""
    return SourceRow(
        source=f"{source.side}: {source.name}{weight}",
        rows=f"{counts.read:,}",
        bad=f"{counts.bad:,}",
        tokens=f"{counts.tokens:,}",
        trained=f"{counts.trained_tokens / counts.tokens:.1%}" if counts.tokens else "-",
    )


def _side(name: str, counts: SideCounts, config: Config) -> list[tuple[str, str]]:
    tokens = counts.tokens
    lines = [
        (
            name,
            f"{counts.rows:,} of {counts.read_rows:,} read, {counts.duplicates:,} of these repeat an earlier"
            f" one; {tokens:,} tokens, {counts.trained_tokens / max(tokens, 1):.1%} of them trained",
        )
    ]
    if counts.masked_replies or counts.weighted_tokens:
        lines.append(
            (
                "weights",
                f"{counts.masked_replies:,} replies have weight 0 and are not trained;"
                f" {counts.weighted_tokens:,} trained tokens have another weight than 1",
            )
        )
    if counts.overlength:
        outcomes = [f"{count:,} {outcome}" for outcome, count in counts.cut.items()]
        lost = [f"{counts.lost_replies:,} replies not trained"] if counts.lost_replies else []
        outcome = ", ".join([*outcomes, *lost]) if config.data.overlength != "error" else "refused"
        lines.append(
            (
                "over-length",
                f"{counts.overlength:,} of {counts.read_rows:,}, the longest {counts.longest_read:,}:"
                f" {outcome}",
            )
        )
    return lines


def _batches(prepared: Prepared, train: Side, config: Config, *, packing: bool) -> list[tuple[str, str]]:
    size, batch = config.train.micro_batch, config.train.global_batch_size
    packs = prepared.packs()
    lengths = train.lengths.astype(np.int64)
    order = Order(lengths, batch, size, config.train.seed, packs if packing else None, config.data.max_length)
    total = int(lengths.sum())
    fill = total / (len(packs) * config.data.max_length)
    shuffled = lengths[np.random.RandomState(0).permutation(len(lengths)) if packing else order.epoch(0)]
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


def _padding(batches: Iterable[npt.NDArray[np.int64]]) -> float:
    """Return the share of padding when each batch of lengths is padded to its longest."""
    used = computed = 0
    for lengths in batches:
        used += int(lengths.sum())
        computed += int(lengths.max()) * len(lengths)
    return 1 - used / max(computed, 1)


def _preparation(index: PreparedIndex) -> str:
    speed = index.read_rows / max(index.seconds, 0.001)
    return (
        f"{index.seconds:.1f} s, {speed:,.0f} rows/s with {index.processes}"
        f" process{'es' * (index.processes > 1)}, at most {index.peak_memory_bytes / 1e6:,.0f} MB of memory"
    )
