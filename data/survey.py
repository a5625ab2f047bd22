"""Rows read without a tokenizer, in this process: counted for a dry run, asked as questions, or shown."""

from collections.abc import Iterator
from typing import NamedTuple

from qwenlora.configs.schema import Data
from qwenlora.data import sources
from qwenlora.data.bad_row import BadRow
from qwenlora.data.counts import BadRowPlace, BadRows
from qwenlora.data.marks import Unfilled, placeholders
from qwenlora.data.rows import Row
from qwenlora.data.tokenise import read_rows, repeats_of, side_of
from qwenlora.run.records import SideName


class Survey(NamedTuple):
    """Counts of rows. train: of an epoch, weights applied; bad: cannot be trained; notes: warnings."""

    train: int
    eval: int
    bad: int
    notes: list[str]


def survey(data: Data) -> Survey:
    """Return how many rows there are. Raises: ValueError listing the bad ones, with data.on_bad_row=error."""
    notes: list[str] = []
    found = sources.find(data, notes.append)
    train = evaluation = 0
    read = [0] * len(found)
    bad, with_bad = BadRows(), set[int]()
    unfilled = Unfilled()
    for number, file, line, row in read_rows(found, notes.append):
        read[number] += 1
        if isinstance(row, BadRow):
            bad.add(BadRowPlace(number, file, line, str(row)), row.roles)
            with_bad.add(number)
            continue
        unfilled.add(found[number].place(file, line), placeholders(row.messages))
        if side_of(row.digest, found[number], data) == "train":
            train += repeats_of(row.digest, found[number].weight)
        else:
            evaluation += 1
    if bad.count and data.on_bad_row == "error":
        bad.among = sum(read[number] for number in with_bad)
        raise ValueError(bad.refusal(found))
    for source, rows in zip(found, read, strict=True):
        if not rows:
            raise ValueError(f"data.{source.side}={source.name} is empty: it has no rows")
    return Survey(train, evaluation, bad.count, [*notes, *unfilled.notes()])


def rows_of_side(data: Data, side: SideName) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of one side that can be trained."""
    found = sources.find(data)
    for number, file, line, row in read_rows(found):
        if not isinstance(row, BadRow) and side_of(row.digest, found[number], data) == side:
            yield found[number].place(file, line), row
