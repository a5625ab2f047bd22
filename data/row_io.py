"""Files as chunks of rows: what is inside is found out, decompressed and decoded to text.

`for chunk in read_chunks(Path("my.jsonl.gz")): chunk.values()`. What is inside decides, not the file's name:
only CSV and TSV are known by their extension. A chunk is about a megabyte and knows its lines, so that a file
of any size is read in little memory, and chunks can be decoded by other processes. JSON is json_rows.py's,
CSV and Parquet are tables.py's, what the rows mean is rows.py's.
"""

import codecs
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from qwenlora.data.chunks import Values
from qwenlora.data.json_rows import Lines, array, lines, one_object
from qwenlora.data.tables import csv_rows, parquet_rows

CHUNK_BYTES = 2**20
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = {
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
_BOMS = {  # UTF-16's begins UTF-32's, so it comes after
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HEAD_BYTES = 512  # enough to tell what a file is


Chunk = Lines | Values


def read_chunks(
    path: Path, encoding: str | None = None, note: Callable[[str], None] = lambda _: None
) -> Iterator[Chunk]:
    """Yield a file's rows in order. encoding: of text, by Python's name; note: hears what was found out.

    Raises: ValueError when the file cannot be read to its end; it names the file, the line and what to do.
    """
    try:
        with path.open("rb") as raw:
            yield from _chunks(path, raw, encoding, note)
    except OSError as error:  # pyarrow's, for compressed streams, have no strerror
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def _chunks(path: Path, raw: IO[bytes], encoding: str | None, note: Callable[[str], None]) -> Iterator[Chunk]:
    head = raw.read(_HEAD_BYTES)
    raw.seek(0)
    compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    kind = extension(path)
    if path.suffix.lower() in COMPRESSED and not compression and head:
        raise ValueError(
            f"{path}: is not compressed as its name says ({path.suffix}): it begins with {_show_bytes(head)};"
            " make it again, or rename it"
        )
    if head.startswith(b"PAR1"):
        yield from parquet_rows(path, raw)
        return
    blocks, head = _peek(_blocks(path, raw, compression))
    for magic, what in _OTHERS.items():
        if head[: len(magic)].lower() == magic.lower():
            raise ValueError(f"{path}: is {what}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: is a tar archive; unpack it")
    if kind == ".parquet":
        begins = f"it begins with {_show_bytes(head)}" if head else "it is empty"
        raise ValueError(f"{path}: no Parquet file: {begins}; make it again, or rename it to what it is")
    if head and not head.strip(b"\0"):
        raise ValueError(f"{path}: holds NUL bytes only: it was not written whole; make it again")
    # the mark at its start is the file's own word, and wins
    marked = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
    encoding = marked or _check_encoding(encoding)
    if not encoding and b"\0" in head[:2]:
        byte_order = "le" if head[0] else "be"
        raise ValueError(
            f"{path}: seems to be UTF-16 text without its mark; write data.encoding: utf-16-{byte_order}"
        )
    if kind in (".csv", ".tsv"):
        encoding = encoding or _find_encoding(path, compression, note)
        yield from csv_rows(path, _text(path, blocks, encoding), raw, "\t" if kind == ".tsv" else None, note)
        return
    if encoding and codecs.lookup(encoding).name != "utf-8":
        blocks, head = _peek(text.encode() for text in _text(path, blocks, encoding))
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[":
        yield from array(path, _text(path, blocks, "utf-8"), raw)
        return
    blocks, head = _peek(blocks, CHUNK_BYTES)
    if problem := one_object(head):
        raise ValueError(f"{path}: {problem}")
    yield from lines(path, blocks, raw)


def extension(path: Path) -> str:
    """Return the extension that says what is inside, in lower case: .csv of MY.CSV.gz."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


# ---- bytes


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


def _peek(stream: Iterator[bytes], size: int = _HEAD_BYTES) -> tuple[Iterator[bytes], bytes]:
    """Return the stream, whole, and its first bytes: at least size of them after white space, if it has
    them."""
    head = b""
    while len(head.lstrip()) < size and (block := next(stream, b"")):
        head += block
    return chain([head] if head else [], stream), head


def _check_encoding(encoding: str | None) -> str | None:
    if encoding:
        try:
            "".encode(encoding)
            codecs.getincrementaldecoder(encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"data.encoding={encoding}: no such encoding; known: utf-8, gb18030, utf-16 ..."
            ) from None
    return encoding


def _find_encoding(path: Path, compression: str | None, note: Callable[[str], None]) -> str:
    """Return utf-8 or, where the whole file is that and reads like Chinese, gb18030."""
    for encoding in ("utf-8", "gb18030"):
        foreign = common = 0
        with path.open("rb") as raw:
            try:
                for text in _text(path, _blocks(path, raw, compression), encoding):
                    if encoding == "gb18030":
                        plain = len(text.encode("ascii", "ignore"))
                        foreign += len(text) - plain
                        common += (len(text.encode("gb2312", "ignore")) - plain) // 2
            except _EncodingError:
                continue
        if encoding == "utf-8":
            return encoding
        if (
            common > 0.9 * foreign
        ):  # Latin-1 and Big5 decode as well, but to characters that hardly anyone uses
            note(f"{path} is read as GB18030; if its text looks wrong, set data.encoding")
            return encoding
    raise ValueError(
        f"{path}: its text is neither UTF-8 nor GB18030; name its encoding, as data.encoding: big5"
    )


class _EncodingError(UnicodeError):
    pass


def _text(path: Path, blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """Yield the blocks as text, without the mark at its start.

    Raises: ValueError (a UnicodeError) naming the byte that is not of that encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    done, first = 0, True
    try:
        for block in blocks:
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block began
            start = done - waiting
            text = decoder.decode(block)
            done += len(block)
            if text:
                yield text.removeprefix("\ufeff") if first else text
                first = False
    except UnicodeError as error:
        start += error.start if isinstance(error, UnicodeDecodeError) else 0
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        name = "UTF-8" if is_utf8 else encoding
        what = (
            "if it is another encoding, name it: data.encoding: gb18030"
            if is_utf8
            else "set data.encoding to what it is"
        )
        raise _EncodingError(f"{path}: not {name} text at byte {start:,}; {what}") from None
    try:
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise ValueError(f"{path}: ends within a character: it was cut off; make the file again") from None


def _show_bytes(head: bytes) -> str:
    return repr(head[:16])[1:]
