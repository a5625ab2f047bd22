"""Counts made while rows are prepared: a prepared folder's index.json, and the report on bad rows."""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel

from qwenlora.data.cache import Index
from qwenlora.data.shapes import KNOWN, as_mapping
from qwenlora.data.sources import Source
from qwenlora.run.records import SideCounts, SideName

SHOWN_KINDS = 20  # of reasons
SHOWN_PLACES = 5  # of one reason


class BadRowPlace(NamedTuple):
    """A bad row's place and reason, a JSON array in bad.jsonl. source, file: numbers from 0; line: from 1."""

    source: int
    file: int
    line: int
    reason: str

    def where(self, sources: list[Source]) -> str:
        """Return the place as messages name it."""
        return sources[self.source].place(self.file, self.line)

    def text(self, sources: list[Source]) -> str:
        """Return `place: reason`."""
        return f"{self.where(sources)}: {self.reason}"


class BadRowKind(BaseModel):
    """Bad rows of one reason. first: the places of the first few."""

    rows: int = 0
    first: list[BadRowPlace] = []

    def text(self, sources: list[Source], *, among: int) -> str:
        """Return `place: reason`, and how many more. among: rows that there are."""
        line, more = self.first[0].text(sources), self.rows - 1
        if not more:
            return line
        if self.rows == among:
            return f"{line}; the same for all {among:,} rows"
        others = ", ".join(place.where(sources) for place in self.first[1:])
        dots = " ..." if more > len(self.first) - 1 else ""
        return f"{line}; the same for {more:,} more row{'s' * (more > 1)}: {others}{dots}"


class BadRows(BaseModel):
    """The bad rows. among: rows of the sources that have bad ones; kinds: by reason, the first SHOWN_KINDS;
    roles: what their unknown roles may mean, all those together that the config should have."""

    count: int = 0
    among: int = 0
    kinds: dict[str, BadRowKind] = {}
    roles: dict[str, str] = {}

    def add(self, place: BadRowPlace, roles: Mapping[str, str]) -> None:
        """Count a bad row. roles: those of BadRow."""
        self.count += 1
        for role, ours in roles.items():
            self.roles.setdefault(role, ours)
        if place.reason not in self.kinds and len(self.kinds) == SHOWN_KINDS:
            return
        kind = self.kinds.setdefault(place.reason, BadRowKind())
        kind.rows += 1
        if len(kind.first) < SHOWN_PLACES:
            kind.first.append(place)

    def report(self, sources: list[Source]) -> str:
        """Return the bad rows, each reason once, and the totals; empty when there are none."""
        if not self.count:
            return ""
        kinds = list(self.kinds.values())
        lines = [kind.text(sources, among=self.among) for kind in kinds]
        shown = lines[0]
        if kinds[0].rows < self.among or self.among == 1:
            rest = self.count - sum(kind.rows for kind in kinds)
            more = [f"and {rest:,} more"] if rest else []
            total = f"{self.count:,} of {self.among:,} rows cannot be trained:"
            shown = "\n  ".join([total, *lines, *more])
        if len(self.roles) > 1:
            shown += f"\nall roles at once: data.roles: {as_mapping(self.roles)}"
        return f"{shown}\n{KNOWN}" if any("unknown shape" in line for line in lines) else shown

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
