"""Chunks of files made into arrays of tokens, with each row's side, and counts. Nothing is written here.

build.py's processes call `tokenise_chunk(...)`; `read_rows(sources)` gives the rows alone, in this process.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow, or_bad
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.marks import placeholders
from qwenlora.data.overlength import cut_to_length
from qwenlora.data.row_io import Chunk
from qwenlora.data.rows import Row, to_row
from qwenlora.data.shapes import RowOptions, shape_of
from qwenlora.data.sources import SIDES, Source
from qwenlora.data.turns import is_masked
from qwenlora.run.records import SideName


class Tokenising(NamedTuple):
    """The options and the encoder, the same for all chunks."""

    data: Data
    encoder: Encoder


class TokenArrays(NamedTuple):
    """The pieces and rows of one chunk and side. A piece is a row, or a part of a long row. ids: int32
    [tokens], trained: bool [tokens]; lengths, row_of (the piece's row in this chunk): int32 [pieces]; lines,
    whole (tokens before data.overlength): int32 [rows]; digests: uint8 [rows, 16]; weights: float32 [tokens],
    None: all are 1."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    row_of: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    whole: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32] | None = None


class TokenisedChunk(NamedTuple):
    """A chunk as arrays. read: number of rows; bad: (line, why); unfilled: (line, its placeholders);
    counts: SideCounts' on long rows."""

    read: int
    bad: list[tuple[int, BadRow]]
    unfilled: list[tuple[int, list[str]]]
    sides: dict[SideName, TokenArrays]
    counts: dict[SideName, Counter[str]]


class _TokenisedRow(NamedTuple):
    """A row as pieces. whole: tokens before data.overlength."""

    line: int
    digest: bytes
    whole: int
    pieces: list[Tokens]


def tokenise_chunk(
    using: Tokenising, source: Source, shape: str | None, chunk: Chunk, *, check_only: bool
) -> TokenisedChunk:
    """Return a chunk as arrays. shape: of the file's rows; check_only: only look for bad rows."""
    everything = list(rows_of(chunk, shape, source.options))
    bad = [(line, row) for line, row in everything if isinstance(row, BadRow)]
    rows = [row for _, row in everything if isinstance(row, Row)]
    if check_only:
        bad += _unrenderable(using.encoder, rows)
        return TokenisedChunk(len(everything), sorted(bad, key=itemgetter(0)), [], {}, {})
    unfilled = [(row.line, names) for row in rows if (names := placeholders(row.messages))]
    by_side, counts = _tokenise(using, source, rows, bad)
    sides = {side: _arrays(tokenised) for side, tokenised in by_side.items() if tokenised}
    return TokenisedChunk(len(everything), sorted(bad, key=itemgetter(0)), unfilled, sides, counts)


def _tokenise(
    using: Tokenising, source: Source, rows: list[Row], bad: list[tuple[int, BadRow]]
) -> tuple[dict[SideName, list[_TokenisedRow]], dict[SideName, Counter[str]]]:
    """Return each side's rows as tokens, and their counts; add rows that cannot be trained to bad."""
    by_side: dict[SideName, list[_TokenisedRow]] = {side: [] for side in SIDES}
    counts: dict[SideName, Counter[str]] = {side: Counter() for side in SIDES}
    for row, tokens in zip(rows, using.encoder.encode(rows), strict=True):
        digest = row.digest
        side = side_of(digest, source, using.data)
        pieces = or_bad(_pieces, using, row, tokens, counts[side])
        if isinstance(pieces, BadRow):
            bad.append((row.line, pieces))
            continue
        assert isinstance(tokens, Tokens), "bad tokens would make bad pieces"
        counts[side]["masked_replies"] += sum(map(is_masked, row.messages))
        by_side[side].append(_TokenisedRow(row.line, digest, len(tokens.ids), pieces))
    return by_side, counts


def _unrenderable(encoder: Encoder, rows: list[Row]) -> list[tuple[int, BadRow]]:
    """Return (line, why) for each row that the chat template refuses."""
    rendered = ((row.line, or_bad(encoder.render, row)) for row in rows)
    return [(line, text) for line, text in rendered if isinstance(text, BadRow)]


def _pieces(using: Tokenising, row: Row, tokens: Tokens, counts: Counter[str]) -> list[Tokens]:
    """Return the pieces of a row, and count the outcome for a long one. Raises: BadRow."""
    data = using.data
    if len(tokens.ids) <= data.max_length:
        return [tokens]
    cut = cut_to_length(row, tokens, using.encoder, data)
    counts.update(
        overlength=1,
        truncated=cut.truncated,
        dropped=not cut.pieces and data.overlength != "error",  # with error, all is refused later
        split=bool(cut.pieces) and data.overlength == "split",
        lost_replies=cut.lost_replies,
    )
    return cut.pieces


def rows_of(chunk: Chunk, shape: str | None, options: RowOptions) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (line, row, or why it cannot be trained) for each row of a chunk."""
    for line, value in chunk.values():
        yield line, or_bad(to_row, line, value, shape, options)


def read_rows(
    sources: list[Source], note: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[int, int, int, Row | BadRow]]:
    """Yield (number of the source, of its file, line, row) for every row, in order, in this process alone."""
    for number, source in enumerate(sources):
        for file, chunk, shape in chunks_with_shape(source, note):
            for line, row in rows_of(chunk, shape, source.options):
                yield number, file, line, row


def chunks_with_shape(
    source: Source, note: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[int, Chunk, str | None]]:
    """Yield (number of the file, chunk, shape of the file's rows) for all of a source's chunks."""
    shape, before = None, -1
    for file, chunk in source.chunks(note):
        if file != before:
            shape, before = None, file
        shape = shape or _first_shape(chunk, source.options)
        yield file, chunk, shape


def side_of(digest: bytes, source: Source, data: Data) -> SideName:
    """Return a row's side. With data.eval_fraction its digest decides, whatever the rows around it."""
    if source.side == "train" and data.eval_fraction and _share(digest[:8]) < data.eval_fraction:
        return "eval"
    return source.side


def repeats_of(digest: bytes, weight: float) -> int:
    """Return how often an epoch sees a row. With weight 2.3, 30% of rows, by digest, are seen three times."""
    whole = int(weight)
    return whole + (_share(digest[8:]) < weight - whole)  # not the bits that eval_fraction uses


def _share(part: bytes) -> float:
    """Return a digest's bytes as a number in [0, 1)."""
    return int.from_bytes(part, "big") / 2.0 ** (8 * len(part))


def _arrays(rows: list[_TokenisedRow]) -> TokenArrays:
    lines, digests, whole, pieces_of_rows = zip(*rows, strict=True)
    pieces = list(chain.from_iterable(pieces_of_rows))
    lengths = [len(piece.ids) for piece in pieces]
    weighted = any(piece.weights is not None for piece in pieces)
    return TokenArrays(
        ids=np.concatenate([np.empty(0, np.int32), *(piece.ids for piece in pieces)]),
        trained=np.concatenate([np.empty(0, np.bool_), *(piece.trained for piece in pieces)]),
        weights=np.concatenate([piece.given_weights() for piece in pieces]) if weighted else None,
        lengths=np.array(lengths, np.int32),
        row_of=np.repeat(np.arange(len(rows), dtype=np.int32), list(map(len, pieces_of_rows))),
        lines=np.array(lines, np.int32),
        whole=np.array(whole, np.int32),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
    )


def _first_shape(chunk: Chunk, options: RowOptions) -> str | None:
    """Return the shape of the first row that has one."""
    shapes = (or_bad(shape_of, value, options) for _, value in chunk.values())
    return next((shape for shape in shapes if isinstance(shape, str)), None)
