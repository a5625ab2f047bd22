"""What a profile says, on one page: time by phase, top operations, when the GPU was idle, memory."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from qwenlora.run.format import count, size

OPERATIONS, GAPS = 15, 5  # rows
NAME_LENGTH = 60  # of kernels: those of templates in C++ fill pages
IDLE_US = 5.0  # a shorter pause between two kernels is the GPU's own
REST = "the rest"


class Span(NamedTuple):
    """start, end: microseconds since the profile's start."""

    name: str
    start: float
    end: float

    @property
    def us(self) -> float:
        """How long it took."""
        return self.end - self.start


class Operation(NamedTuple):
    """Calls of one operation and their own time in microseconds, without that of operations in them: on the
    GPU and on the CPU."""

    name: str
    calls: int
    gpu_us: float
    cpu_us: float


class Gap(NamedTuple):
    """A time in which the GPU was idle. after, before: the kernels around it; phase: the CPU's then."""

    us: float
    after: str
    before: str
    phase: str


@dataclass(frozen=True)
class Profiled:
    """What was seen of some steps. device: a GPU's name, or CPU; on_gpu: phases as the GPU had them; kernels:
    all that the GPU did; memory: {category: bytes}."""

    device: str
    steps: list[Span]
    phases: list[Span]
    operations: list[Operation]
    memory: dict[str, int]
    on_gpu: list[Span] = field(default_factory=list)
    kernels: list[Span] = field(default_factory=list)

    @property
    def whole(self) -> Span:
        """From the start of the first step to the end of the last, on CPU and GPU."""
        ends = [span.end for span in (*self.steps, *self.kernels)]
        return Span("whole", self.steps[0].start, max(ends))


def page(seen: Profiled, title: str, trace: str) -> str:
    """Return the page as Markdown. trace: the name of the file that holds all of it."""
    each = ", ".join(f"{step.us / 1e6:.3g}" for step in seen.steps)
    parts = [
        f"# {title}",
        f"On rank 0, {seen.device}. The steps took {each} s; the profiler slows them. `{trace}` holds all of"
        " it, for https://ui.perfetto.dev.",
        "## Time by phase, a step",
        _phases(seen),
        f"## Top operations by time on the {'GPU' if seen.kernels else 'CPU'}, a step",
        _operations(seen),
        *(["## When the GPU was idle", *_idle(seen)] if seen.kernels else []),
        "## Memory of this rank",
        _table(("what", "bytes"), [(name, size(value)) for name, value in seen.memory.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans without overlaps, in their order. Their names do not matter."""
    result: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        last = result[-1] if result else None
        if last is None or span.start > last.end:
            result.append(span)
        elif span.end > last.end:
            result[-1] = last._replace(end=span.end)
    return result


def gaps(seen: Profiled) -> list[Gap]:
    """Return the times in which the GPU was idle, from the first step to the last, the longest first."""
    found = []
    end, after = seen.whole.start, "the start"
    for kernel in sorted(seen.kernels, key=lambda kernel: kernel.start):
        if kernel.start - end > IDLE_US:
            found.append(
                Gap(kernel.start - end, after, kernel.name, _phase_at((end + kernel.start) / 2, seen))
            )
        if kernel.end > end:
            end, after = kernel.end, kernel.name
    if seen.whole.end - end > IDLE_US:
        found.append(Gap(seen.whole.end - end, after, "the end", _phase_at((end + seen.whole.end) / 2, seen)))
    return sorted(found, key=lambda gap: -gap.us)


def _phase_at(moment: float, seen: Profiled) -> str:
    return next((span.name for span in seen.phases if span.start <= moment <= span.end), REST)


def _phases(seen: Profiled) -> str:
    whole, number = seen.whole.us, len(seen.steps)
    names = list(dict.fromkeys(span.name for span in seen.phases))
    rows = []
    for name in names:
        on_cpu, on_gpu = (
            _total(span for span in spans if span.name == name) for spans in (seen.phases, seen.on_gpu)
        )
        rows.append((name, _ms(on_cpu / number), f"{on_cpu / whole:.1%}", _ms(on_gpu / number)))
    rest = whole - _total(seen.phases)
    rows.append((REST, _ms(rest / number), f"{rest / whole:.1%}", ""))
    columns = 4 if seen.kernels else 3
    heads = ("phase", "ms", "share", "ms from its first kernel to its last")
    return _table(heads[:columns], [row[:columns] for row in rows])


def _operations(seen: Profiled) -> str:
    number, on_gpu = len(seen.steps), bool(seen.kernels)
    whole = seen.whole.us
    own = sorted(seen.operations, key=lambda one: -(one.gpu_us if on_gpu else one.cpu_us))
    rows = [_row(one, number, whole, on_gpu=on_gpu) for one in own[:OPERATIONS]]
    others = own[OPERATIONS:]
    if others:
        together = Operation(
            count(len(others), "other"),
            sum(one.calls for one in others),
            sum(one.gpu_us for one in others),
            sum(one.cpu_us for one in others),
        )
        rows.append(_row(together, number, whole, on_gpu=on_gpu))
    outside = whole - sum(one.cpu_us for one in own)
    if outside > 0 and not on_gpu:
        rows.append(
            _row(Operation("between operations (Python)", 0, 0, outside), number, whole, on_gpu=False)
        )
    heads = ("operation", "calls", "ms", "share of the time", *(["ms on the CPU"] if on_gpu else []))
    return _table(heads, rows)


def _row(one: Operation, number: int, whole: float, *, on_gpu: bool) -> tuple[str, ...]:
    us = one.gpu_us if on_gpu else one.cpu_us
    row = (
        one.name[:NAME_LENGTH],
        f"{one.calls / number:,.0f}" if one.calls else "",
        _ms(us / number),
        f"{us / whole:.1%}",
    )
    return (*row, _ms(one.cpu_us / number)) if on_gpu else row


def _idle(seen: Profiled) -> list[str]:
    found, whole, number = gaps(seen), seen.whole.us, len(seen.steps)
    idle = sum(gap.us for gap in found)
    said = (
        f"{idle / whole:.1%} of the time, {_ms(idle / number)} ms a step, in {count(len(found), 'gap')} over"
        f" {IDLE_US:.0f} us. The longest:"
    )
    rows = [
        (_ms(gap.us), gap.phase, gap.after[:NAME_LENGTH], gap.before[:NAME_LENGTH]) for gap in found[:GAPS]
    ]
    return [said, _table(("ms", "the CPU was in", "after", "before"), rows)] if rows else ["Never."]


def _total(spans: Iterable[Span]) -> float:
    return sum(span.us for span in merged(spans))


def _ms(us: float) -> str:
    return f"{us / 1000:,.3g}" if us < 1e6 else f"{us / 1000:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=box.MARKDOWN)
    for number, head in enumerate(heads):
        figures = all(row[number][:1].isdecimal() for row in rows if row[number])
        table.add_column(head, justify="right" if figures else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=400, markup=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())
