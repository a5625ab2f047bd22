"""Rows read from a file, about a thousand at a time, each with its line."""

from collections.abc import Iterator
from itertools import islice
from typing import IO, NamedTuple

CHUNK_ROWS = 1000
MAX_LINE_BYTES = 2**28

JsonObject = dict[str, object]
Decoded = tuple[int, object]  # line, and the row's value, or the BadRow that says why it has none


class Values(NamedTuple):
    """Rows that are decoded already. read: bytes of the file read so far."""

    rows: list[Decoded]
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row."""
        yield from self.rows


def in_chunks(rows: Iterator[Decoded], raw: IO[bytes]) -> Iterator[Values]:
    """Yield decoded rows of a file as chunks."""
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield Values(chunk, position(raw))


def position(raw: IO[bytes]) -> int:
    """Return the bytes read so far; 0 where the decompressor has closed the file."""
    return 0 if raw.closed else raw.tell()
