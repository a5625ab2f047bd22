"""Rows looked at without a tokenizer, in this process alone: counted for a dry run, asked as questions,
shown."""

from collections.abc import Iterator
from typing import NamedTuple

from qwenlora.configs.schema import Data
from qwenlora.data import sources
from qwenlora.data.arrays import SHOWN_BAD_ROWS, refusal
from qwenlora.data.bad_row import BadRow
from qwenlora.data.rows import Row
from qwenlora.data.sources import SideName
from qwenlora.data.tokenise import read, repeats_of, side_of


class Survey(NamedTuple):
    """Counts of rows. train: of an epoch, weights applied; eval; bad: those that cannot be trained; notes:
    warnings."""

    train: int
    eval: int
    bad: int
    notes: list[str]


def survey(data: Data) -> Survey:
    """Return how many rows there are. Raises: ValueError listing the bad ones, when data.on_bad_row is
    error."""
    notes: list[str] = []
    found = sources.find(data, notes.append)
    train = others = 0
    seen = [0] * len(found)
    bad: list[tuple[int, int, int, str]] = []
    for number, file, line, row in read(found, notes.append):
        seen[number] += 1
        if isinstance(row, BadRow):
            bad.append((number, file, line, str(row)))
        elif side_of(row.digest, found[number], data) == "train":
            train += repeats_of(row.digest, found[number].weight)
        else:
            others += 1
    if bad and data.on_bad_row == "error":
        among = sum(seen[number] for number in {source for source, *_ in bad})
        facts = {"bad": len(bad), "bad_among": among, "first_bad": bad[:SHOWN_BAD_ROWS]}
        raise ValueError(refusal(facts, found))
    for source, rows in zip(found, seen, strict=True):
        if not rows:
            raise ValueError(f"data.{source.side}={source.name} is empty: it has no rows")
    return Survey(train, others, len(bad), notes)


def rows_of_side(data: Data, side: SideName) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of one side that can be trained."""
    found = sources.find(data)
    for number, file, line, row in read(found):
        if not isinstance(row, BadRow) and side_of(row.digest, found[number], data) == side:
            yield found[number].place(file, line), row
