"""What torch's profiler recorded. torch needs minutes and gigabytes for its tables of a long step, while the
other ranks wait; here its events are read as they are."""

import gzip
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from qwenlora.trainer.record.profile_page import Operation, Span

MEMORY = "[memory]"  # torch's name of an allocation
NO_OPERATIONS = {MEMORY, "[OutOfMemory]"}


class Event(NamedTuple):
    """start, end: microseconds since the profile's start; named: by record_function; id: of an operation on
    the CPU; of: the operation that started this on the GPU, or 0."""

    name: str
    start: float
    end: float
    on_gpu: bool
    named: bool
    thread: int
    id: int
    of: int

    @property
    def is_kernel(self) -> bool:
        """Whether the GPU did it."""
        return self.on_gpu and not self.named

    @property
    def is_operation(self) -> bool:
        """Whether the CPU did it; CUDA's own calls are part of the operation that makes them."""
        return not (self.on_gpu or self.named or self.of)

    @property
    def span(self) -> Span:
        """When it was."""
        return Span(self.name, self.start, self.end)


class Recorded:
    """The events of a profile that has been stopped."""

    def __init__(self, profile: Any) -> None:
        self._profile = profile
        result = profile.profiler.kineto_results
        self._begun: int = result.trace_start_ns()
        self._raw = result.events()
        self.events = [
            Event(
                one.name(),
                self._us(one.start_ns()),
                self._us(one.end_ns()),
                one.device_type().name != "CPU",
                one.is_user_annotation(),
                one.start_thread_id(),
                one.correlation_id(),
                one.linked_correlation_id(),
            )
            for one in self._raw
            if one.name() not in NO_OPERATIONS and not one.is_async()
        ]

    def _us(self, moment_ns: int) -> float:
        return (moment_ns - self._begun) / 1000

    def named(self, names: Iterable[str], *, on_gpu: bool = False) -> list[Span]:
        """Return what has names of record_function that begin with some of these, in order."""
        wanted = tuple(names)
        found = (one for one in self.events if one.named and one.on_gpu == on_gpu)
        return sorted((one.span for one in found if one.name.startswith(wanted)), key=attrgetter("start"))

    def allocated(self, *, on_gpu: bool) -> list[tuple[float, int]]:
        """Return [(microseconds, bytes more than at the start)] after each allocation and release."""
        changes = [
            (self._us(one.start_ns()), one.nbytes())
            for one in self._raw
            if one.name() == MEMORY and (one.device_type().name != "CPU") == on_gpu
        ]
        total, totals = 0, []
        for moment, more in sorted(changes):
            total += more
            totals.append((moment, total))
        return totals

    def write(self, trace: Path) -> None:
        """Write the Chrome trace, compressed."""
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(whole))
            with whole.open("rb") as read, gzip.open(trace, "wb", compresslevel=6) as written:
                shutil.copyfileobj(read, written, 2**20)


def operations(events: list[Event]) -> list[Operation]:
    """Return the operations by name, with their own time: without that of operations that they call. A
    kernel's time is that of the operation that started it; of an unknown one, it stands for itself."""
    cpu_us, gpu_us, calls = (defaultdict[str, float](float) for _ in range(3))
    names = {one.id: one.name for one in events if one.is_operation}
    for name, us in _own_times(events):
        calls[name] += 1
        cpu_us[name] += us
    for one in events:
        if one.is_kernel:
            gpu_us[names.get(one.of, one.name)] += one.span.us
    return [
        Operation(name, int(calls[name]), gpu_us[name], cpu_us[name])
        for name in cpu_us.keys() | gpu_us.keys()
    ]


def _own_times(events: list[Event]) -> Iterable[tuple[str, float]]:
    """Yield the name and own time of each operation on the CPU, in microseconds."""
    inside: dict[int, list[int]] = defaultdict(list)  # of each thread: those that are not over yet
    ordered = sorted((one for one in events if one.is_operation), key=lambda one: (one.start, -one.end))
    own = [one.span.us for one in ordered]
    for number, one in enumerate(ordered):
        stack = inside[one.thread]
        while stack and ordered[stack[-1]].end <= one.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= one.span.us
        stack.append(number)
    return zip((one.name for one in ordered), own, strict=True)
