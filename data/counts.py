"""Counts made while rows are prepared: a prepared folder's index.json, and the report on bad rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, TypeAdapter

from qwenlora.data.cache import Index
from qwenlora.data.shapes import KNOWN
from qwenlora.data.sources import Source
from qwenlora.run.records import SideCounts, SideName

SHOWN_BAD_ROWS = 20


class BadRowPlace(NamedTuple):
    """A bad row's place and reason, a JSON array in bad.jsonl. source, file: numbers from 0; line: from 1."""

    source: int
    file: int
    line: int
    reason: str

    def text(self, sources: list[Source]) -> str:
        """Return `place: reason`."""
        return f"{sources[self.source].place(self.file, self.line)}: {self.reason}"


class BadRows(BaseModel, frozen=True):
    """The bad rows. among: rows of the sources that have bad ones; first: the first SHOWN_BAD_ROWS."""

    count: int = 0
    among: int = 0
    first: list[BadRowPlace] = []

    def report(self, sources: list[Source]) -> str:
        """Return the first bad rows with their places, and the totals; empty when there are none."""
        if not self.count:
            return ""
        lines = [place.text(sources) for place in self.first]
        shapes = f"\n{KNOWN}" if any("unknown shape" in line for line in lines) else ""
        if self.count == self.among > 1 and len({place.reason for place in self.first}) == 1:
            which = "all" if self.count <= SHOWN_BAD_ROWS else f"the first {SHOWN_BAD_ROWS} of"
            return f"{lines[0]}; the same for {which} {self.among:,} rows{shapes}"
        shown = "\n  ".join(lines)
        more = f"\n  and {self.count - len(lines):,} more" if self.count > len(lines) else ""
        return f"{self.count:,} of {self.among:,} rows cannot be trained:\n  {shown}{more}{shapes}"

    def refusal(self, sources: list[Source]) -> str:
        """Return the report, and what to do."""
        return f"{self.report(sources)}\nmend or remove them, or leave them out: data.on_bad_row: skip"


class SourceCounts(BaseModel, frozen=True):
    """Counts of one source, weights not applied."""

    read: int = 0
    bad: int = 0
    tokens: int = 0
    trained_tokens: int = 0


class Overlap(BaseModel, frozen=True):
    """Evaluation rows that are training rows, too. first: the numbers of the first five."""

    rows: int = 0
    first: list[int] = []


class PreparedIndex(Index):
    """The index.json of prepared rows. notes: warnings; seconds to peak_memory_bytes: of the preparation."""

    read_rows: int
    bad: BadRows
    sides: dict[SideName, SideCounts]
    sources: list[SourceCounts]
    overlap: Overlap
    notes: list[str]
    seconds: float = 0.0
    processes: int = 1
    peak_memory_bytes: int = 0


def bad_lines(folder: Path, sources: list[Source]) -> Iterator[str]:
    """Yield every bad row of a prepared folder as `place: reason`."""
    line = TypeAdapter(BadRowPlace)
    with (folder / "bad.jsonl").open(encoding="utf-8") as file:
        for text in file:
            yield line.validate_json(text).text(sources)
