"""A chunk of a file made into pieces of tokens: rows, their side, and what was counted of them.

`read(sources)` gives rows alone, in this process; `treat(...)` is what build.py's processes do with each
chunk. Nothing is written here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.overlength import fit
from qwenlora.data.row_io import Chunk
from qwenlora.data.rows import Options, Row, shape_of, to_row
from qwenlora.data.sources import SIDES, SideName, Source


class Job(NamedTuple):
    """What every chunk is treated with."""

    data: Data
    encoder: Encoder


class Piece(NamedTuple):
    """Arrays of the pieces and rows of one chunk and side.

    ids: int32 [tokens], trained: bool [tokens], lengths: int32 [pieces], row_of: int32 [pieces], number of a
    row here;
    lines, whole: int32 [rows], whole: tokens before data.overlength; digests: uint8 [rows, 16].
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    row_of: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    whole: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint8]


class Done(NamedTuple):
    """A chunk's outcome. bad: (line, reason); counts: {side: {what: how many}}."""

    read: int
    bad: list[tuple[int, str]]
    sides: dict[SideName, Piece]
    counts: dict[SideName, Counter[str]]


def treat(job: Job, source: Source, shape: str | None, chunk: Chunk, *, tokenise: bool) -> Done:
    """Return the pieces of a chunk's rows. tokenise: false only looks for bad rows."""
    bad: list[tuple[int, str]] = []
    rows: list[Row] = []
    read = 0
    for line, row in rows_of(chunk, shape, source.options):
        read += 1
        if isinstance(row, BadRow):
            bad.append((line, str(row)))
        else:
            rows.append(row)
    if not tokenise:
        for row in rows:
            try:
                job.encoder.render(row)
            except BadRow as error:
                bad.append((row.line, str(error)))
        return Done(read, sorted(bad), {}, {})
    held: dict[SideName, list[tuple[Row, bytes, int, list[Tokens]]]] = {side: [] for side in SIDES}
    counts: dict[SideName, Counter[str]] = {side: Counter() for side in SIDES}
    for row, tokens in zip(rows, job.encoder.encode(rows), strict=True):
        digest = row.digest
        side = side_of(digest, source, job.data)
        try:
            if isinstance(tokens, BadRow):
                raise tokens
            pieces = [tokens]
            if len(tokens.ids) > job.data.max_length:
                fitted = fit(row, tokens, job.encoder, job.data)
                pieces = fitted.pieces
                counts[side].update(
                    overlength=1,
                    truncated=fitted.cut,
                    dropped=not pieces and job.data.overlength != "error",  # then all is refused
                    split=bool(pieces) and job.data.overlength == "split",
                    lost_replies=fitted.lost,
                )
            held[side].append((row, digest, len(tokens.ids), pieces))
        except BadRow as error:
            bad.append((row.line, str(error)))
    return Done(read, sorted(bad), {side: _arrays(found) for side, found in held.items() if found}, counts)


def rows_of(chunk: Chunk, shape: str | None, options: Options) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (line, row or why it is none) for each row of a chunk."""
    for line, value in chunk.values():
        try:
            if isinstance(value, BadRow):
                raise value
            yield line, to_row(line, value, shape or shape_of(value, options), options)
        except BadRow as error:
            yield line, error


def read(
    sources: list[Source], note: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[int, int, int, Row | BadRow]]:
    """Yield (number of the source, of its file, line, row) for every row, in order, in this process alone."""
    for number, source in enumerate(sources):
        for file, chunk, shape in shaped(source, note):
            for line, row in rows_of(chunk, shape, source.options):
                yield number, file, line, row


def shaped(
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
    """Return where a row belongs: by data.eval_fraction, its digest decides, whatever stands beside it."""
    if source.side == "train" and data.eval_fraction and _share(digest[:8]) < data.eval_fraction:
        return "eval"
    return source.side


def repeats_of(digest: bytes, weight: float) -> int:
    """Return how often an epoch sees a row: a fraction of a weight is for rows chosen by their digest."""
    whole = int(weight)  # and other bits than eval_fraction's
    return whole + (_share(digest[8:]) < weight - whole)


def _share(part: bytes) -> float:
    """Return a number in [0, 1) that a digest decides."""
    return int.from_bytes(part, "big") / 2.0 ** (8 * len(part))


def _arrays(held: list[tuple[Row, bytes, int, list[Tokens]]]) -> Piece:
    pieces = [piece for *_, found in held for piece in found]
    empty = Tokens(np.empty(0, np.int32), np.empty(0, np.bool_))
    return Piece(
        np.concatenate([piece.ids for piece in pieces or [empty]]),
        np.concatenate([piece.trained for piece in pieces or [empty]]),
        np.array([len(piece.ids) for piece in pieces], np.int32),
        np.repeat(np.arange(len(held), dtype=np.int32), [len(found) for *_, found in held]),
        np.array([row.line for row, *_ in held], np.int32),
        np.array([whole for *_, whole, _ in held], np.int32),
        np.frombuffer(b"".join(digest for _, digest, *_ in held), np.uint8).reshape(-1, 16),
    )


def _first_shape(chunk: Chunk, options: Options) -> str | None:
    """Return the shape of the first row that has one."""
    for _, value in chunk.values():
        if not isinstance(value, BadRow):
            try:
                return shape_of(value, options)
            except BadRow:
                continue
    return None
