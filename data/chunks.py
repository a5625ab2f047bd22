"""Rows on their way from a file: some thousand at a time, each with its line, decoded or not yet."""

from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, NamedTuple

CHUNK_ROWS = 1000
MAX_LINE_BYTES = 2**28

Decoded = tuple[int, Any]  # line, and the row's value or the BadRow that it is


class Values(NamedTuple):
    """Rows that are decoded already. read: bytes of the file read so far."""

    rows: list[Decoded]
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row."""
        yield from self.rows


def in_chunks(rows: Iterator[Decoded], raw: IO[bytes]) -> Iterator[Values]:
    """Yield decoded rows of a file as chunks."""
    while some := list(islice(rows, CHUNK_ROWS)):
        yield Values(some, position(raw))


def position(raw: IO[bytes]) -> int:
    """Return the bytes read so far; 0 where the decompressor has closed the file."""
    return 0 if raw.closed else raw.tell()
