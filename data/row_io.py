"""Files as chunks of rows, whatever their format, compression and encoding.

`for chunk in read_chunks(Path("my.jsonl.gz")): chunk.values()`. A file's bytes show its format; only CSV,
TSV and plain text are known by their extension. A chunk is about a megabyte and knows its lines, so that a
file of any size is read in little memory, and other processes can decode it. rows.py reads the values'
meaning.
"""

import codecs
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from qwenlora.data import encodings
from qwenlora.data.chunks import Values
from qwenlora.data.json_rows import Lines, array, arrays, holds_lists_of_turns, lines, one_object
from qwenlora.data.plain_text import is_json, text_rows
from qwenlora.data.tables import csv_rows, parquet_rows

CHUNK_BYTES = 2**20
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
TEXT = ".txt"  # read where it is named; in a folder it may be a licence
COMPRESSED = (".gz", ".zst")

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_NOT_READ = {
    b"PK\x03\x04": "a zip archive or Excel workbook; save it as CSV or JSON Lines, or unpack it",
    b"%PDF": "a PDF; rows are read from JSON, CSV or Parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV",
    b"BZh": "bzip2; unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "xz; unpack it, or compress it with gzip or zstd",
    b"\x1f\x8b": "compressed twice; unpack it once",
    b"\x28\xb5\x2f\xfd": "compressed twice; unpack it once",
    b"PAR1": "a compressed Parquet file; unpack it: Parquet is compressed inside",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"SQLite format 3": "an SQLite database; export its rows as CSV or JSON Lines",
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch it: git lfs pull",
    b"<!DOCTYPE": "a web page, not the data; download the file itself (its raw link)",
    b"<html": "a web page, not the data; download the file itself (its raw link)",
}
_HEAD_BYTES = 512  # enough to know a file's format


Chunk = Lines | Values


def read_chunks(
    path: Path, encoding: str | None = None, note: Callable[[str], None] = lambda _: None
) -> Iterator[Chunk]:
    """Yield a file's rows in order. encoding: Python's name; note: is called with a line on guesses.
    Raises: ValueError naming file, line and cure when the file cannot be read to its end."""
    try:
        with path.open("rb") as raw:
            yield from _chunks(path, raw, encoding, note)
    except OSError as error:  # pyarrow's, for compressed streams, have no strerror
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def _chunks(path: Path, raw: IO[bytes], encoding: str | None, note: Callable[[str], None]) -> Iterator[Chunk]:
    head = raw.read(_HEAD_BYTES)
    raw.seek(0)
    compression = _compression(path, head)
    if head.startswith(b"PAR1"):
        yield from parquet_rows(path, raw)
        return
    blocks, head = _peek(_blocks(path, raw, compression))
    _refuse_other_formats(path, head)
    encoding = encodings.named(path, head, encoding)
    kind = extension(path)
    if kind in (".csv", ".tsv") or (kind == TEXT and not is_json(head, encoding)):
        if not encoding:
            encoding = encodings.find(path, lambda: _blocks_of(path, compression), note)
        texts = encodings.decode(path, blocks, encoding)
        if kind == TEXT:
            yield from text_rows(path, texts, raw, note)
        else:
            yield from csv_rows(path, texts, raw, "\t" if kind == ".tsv" else None, note)
        return
    if encoding and codecs.lookup(encoding).name != "utf-8":
        blocks, head = _peek(text.encode() for text in encodings.decode(path, blocks, encoding))
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        blocks, head = _peek(blocks, CHUNK_BYTES)
        text = head.decode(errors="ignore").removeprefix("\ufeff")
        read = arrays if holds_lists_of_turns(text) else array
        yield from read(path, encodings.decode(path, blocks, "utf-8"), raw)
        return
    blocks, head = _peek(blocks, CHUNK_BYTES)
    if problem := one_object(head):
        raise ValueError(f"{path}: {problem}")
    yield from lines(path, blocks, raw)


def _compression(path: Path, head: bytes) -> str | None:
    compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if path.suffix.lower() in COMPRESSED and not compression and head:
        raise ValueError(
            f"{path}: is not compressed as its name says ({path.suffix}): it begins with {_show_bytes(head)};"
            " make it again, or rename it"
        )
    return compression


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for magic, what in _NOT_READ.items():
        if head[: len(magic)].lower() == magic.lower():
            raise ValueError(f"{path}: is {what}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: is a tar archive; unpack it")
    if extension(path) == ".parquet":
        begins = f"it begins with {_show_bytes(head)}" if head else "it is empty"
        raise ValueError(f"{path}: no Parquet file: {begins}; make it again, or rename it to what it is")
    if head and not head.strip(b"\0"):
        raise ValueError(f"{path}: holds NUL bytes only: it was not written whole; make it again")


def extension(path: Path) -> str:
    """Return the extension of the content, in lower case: .csv for MY.CSV.gz."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _blocks(path: Path, raw: IO[bytes], compression: str | None) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed."""
    if compression is None:
        while block := raw.read(CHUNK_BYTES):
            yield block
        return
    import pyarrow

    size = 0
    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression) as stream:
            while block := stream.read(CHUNK_BYTES):
                size += len(block)
                yield block
    except (OSError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path}: {compression} data is cut off or damaged after {size:,} bytes ({error}); make the file"
            " again"
        ) from None


def _blocks_of(path: Path, compression: str | None) -> Iterator[bytes]:
    with path.open("rb") as raw:
        yield from _blocks(path, raw, compression)


def _peek(stream: Iterator[bytes], size: int = _HEAD_BYTES) -> tuple[Iterator[bytes], bytes]:
    """Return the whole stream, and its first bytes: if possible, size of them after white space."""
    head = b""
    while len(head.lstrip()) < size and (block := next(stream, b"")):
        head += block
    return chain([head] if head else [], stream), head


def _show_bytes(head: bytes) -> str:
    return repr(head[:16])[1:]
