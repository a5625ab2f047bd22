"""Files as chunks of rows: JSON arrays, JSON Lines, CSV/TSV, Parquet, plain or compressed, and data sets of the hub.

`for chunk in read_chunks(Path("my.jsonl.gz")): chunk.values()`. What is inside decides, not the file's name: only CSV
and TSV are known by their extension. A chunk is about a megabyte and knows its lines, so that a file of any size is
read in little memory, and chunks can be decoded by other processes (JSON Lines are not decoded before). What the rows
mean is rows.py's.
"""

import codecs
import csv
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

CHUNK_BYTES = 2**20
CHUNK_ROWS = 1000
MAX_LINE_BYTES = 2**28
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
TWICE = "\0twice"  # a JSON key that no file has: marks an object in which another key stands twice

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = {
    b"PK\x03\x04": "a zip archive or Excel workbook; save it as CSV or JSON Lines, or unpack it",
    b"%PDF": "a PDF; rows are read from JSON, CSV or Parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV",
    b"BZh": "bzip2; compress it with gzip or zstd instead",
    b"\xfd7zXZ": "xz; compress it with gzip or zstd instead",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"SQLite format 3": "an SQLite database; export its rows as CSV or JSON Lines",
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch it: git lfs pull",
}
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class BadRow(ValueError):
    """A row that cannot be trained, though the rows after it can be read."""


Decoded = tuple[int, Any]  # line, and the row's value or the BadRow that it is


class Lines(NamedTuple):
    """Whole lines of JSON. first: the number of the first one; read: bytes of the file read so far."""

    first: int
    blob: bytes
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row that is not blank."""
        for number, line in enumerate(self.blob.split(b"\n"), self.first):
            if not line.isspace() and line:
                try:
                    yield number, decode_json(line)
                except BadRow as error:
                    yield number, error


class Values(NamedTuple):
    """Rows that are decoded already. read: bytes of the file read so far."""

    rows: list[Decoded]
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row."""
        yield from self.rows


Chunk = Lines | Values


def read_chunks(path: Path, encoding: str | None = None, note: Callable[[str], None] = lambda _: None) -> Iterator[Chunk]:
    """Yield a file's rows in order. encoding: of text, by Python's name; note: hears what was found out.

    Raises: ValueError when the file cannot be read to its end; it names the file, the line and what to do.
    """
    try:
        with path.open("rb") as raw:
            yield from _chunks(path, raw, encoding, note)
    except OSError as error:  # pyarrow's, for compressed streams, have no strerror
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None


def _chunks(path: Path, raw: IO[bytes], encoding: str | None, note: Callable[[str], None]) -> Iterator[Chunk]:
    head = raw.read(64)
    raw.seek(0)
    compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    kind = path.suffixes[-2] if compression and len(path.suffixes) > 1 else path.suffix
    if path.suffix in COMPRESSED and not compression and head:
        raise ValueError(f"{path}: is not compressed as its name says ({path.suffix}); it begins with {_show_bytes(head)}")
    if head.startswith(b"PAR1"):
        yield from _parquet(path, raw)
        return
    if kind == ".parquet":
        raise ValueError(f"{path}: no Parquet file: it begins with {_show_bytes(head) or 'nothing: it is empty'}")
    stream = _blocks(path, raw, compression)
    head = next(stream, b"")
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is {what}")
    if head and not head.strip(b"\0"):
        raise ValueError(f"{path}: holds NUL bytes only: it was not written whole; make it again")
    encoding = _check_encoding(path, encoding) or next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
    if kind in (".csv", ".tsv"):
        encoding = encoding or _find_encoding(path, compression, note)
        yield from _csv(path, _text(path, _again(head, stream), encoding), raw, "\t" if kind == ".tsv" else None, note)
        return
    blocks = _again(head, stream)
    if encoding and codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        blocks = (text.encode() for text in _text(path, blocks, encoding))
        head = next(blocks, b"")
        blocks = _again(head, blocks)
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _array(path, _text(path, blocks, "utf-8-sig"), raw)
    else:
        yield from _lines(path, blocks, raw)


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
            f"{path}: {compression} data is cut off or damaged after {size:,} bytes ({error}); make the file again"
        ) from None


def _position(raw: IO[bytes]) -> int:
    """Return the bytes read so far; 0 where the decompressor has closed the file."""
    return 0 if raw.closed else raw.tell()


def _again(head: bytes, stream: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from stream


def _check_encoding(path: Path, encoding: str | None) -> str | None:
    if encoding:
        try:
            "".encode(encoding)
        except LookupError:
            raise ValueError(f"data.encoding={encoding}: no such encoding; known: utf-8, gb18030, utf-16 ...") from None
    return encoding


def _find_encoding(path: Path, compression: str | None, note: Callable[[str], None]) -> str:
    """Return utf-8-sig or, where the whole file is that, gb18030."""
    problem = ""
    for encoding in ("utf-8", "gb18030"):
        with path.open("rb") as raw:
            try:
                for _ in _text(path, _blocks(path, raw, compression), encoding):
                    pass
            except UnicodeError as error:
                problem = problem or str(error)
                continue
        if encoding == "gb18030":
            note(f"{path} is read as GB18030; if its text looks wrong, set data.encoding")
        return {"utf-8": "utf-8-sig"}.get(encoding, encoding)
    raise ValueError(f"{problem}, and no GB18030; set data.encoding to what it is")


class _NotThatEncoding(UnicodeError):
    pass


def _text(path: Path, blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """Yield the blocks as text. Raises: ValueError (a UnicodeError) naming the byte that is not of that encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0
    block: bytes = b""
    try:
        for block in blocks:
            yield decoder.decode(block)
            done += len(block)
        block = b""
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        start = done + error.start if isinstance(error, UnicodeDecodeError) and block else done
        name = {"utf-8-sig": "UTF-8", "utf-8": "UTF-8"}.get(encoding, encoding)
        raise _NotThatEncoding(
            f"{path}: not {name} text at byte {start:,}; if it is another encoding, name it: data.encoding: gb18030"
        ) from None


# ---- JSON


def decode_json(line: bytes | str) -> Any:
    """Return the value of one line of JSON. Raises: BadRow saying what is wrong, and in which column."""
    try:
        text = line if isinstance(line, str) else line.removeprefix(codecs.BOM_UTF8).decode()
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8 text at byte {error.start} of the line; if the file is another encoding, name it:"
            " data.encoding: gb18030"
        ) from None
    except json.JSONDecodeError as error:
        raise BadRow(_json_problem(error) + _json_hint(text)) from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadRow(f"not valid JSON: {error}") from None


def _json_problem(error: json.JSONDecodeError) -> str:
    return f"not valid JSON: {error.msg} at column {error.colno}"


def _json_hint(text: str) -> str:
    text = text.strip()
    if "\0" in text:
        return " (it holds NUL bytes: the file was not written whole)"
    if text[:1] == "{" and text[-1:] != "}":
        return " (an object over several lines? JSON Lines wants one a line: jq -c . old > new; or the line was cut off)"
    if text[:1] not in '{["':
        return " (plain text? a row is an object: {\"text\": \"...\"})"
    return ""


def _lines(path: Path, blocks: Iterator[bytes], raw: IO[bytes]) -> Iterator[Chunk]:
    line, rest = 1, [b""]
    for block in blocks:
        whole, newline, tail = block.rpartition(b"\n")
        if newline:
            blob = b"".join([*rest, whole])
            yield Lines(line, blob, _position(raw))
            line += blob.count(b"\n") + 1
            rest = [tail]
        else:
            rest.append(block)
            if sum(map(len, rest)) > MAX_LINE_BYTES:
                raise ValueError(f"{path}:{line}: this line is longer than {MAX_LINE_BYTES >> 20} MiB; one row a line")
    if any(rest):
        yield Lines(line, b"".join(rest), _position(raw))


def _array(path: Path, texts: Iterator[str], raw: IO[bytes]) -> Iterator[Chunk]:
    """Read a JSON array element by element, however long it is."""
    buffer, position, line, ended = "", 0, 1, False

    def more() -> bool:
        nonlocal buffer, position, ended
        text = next(texts, None)
        ended = text is None
        # at least twice the row so far, so that a long row is not tried over and over
        while text is not None and len(text) < len(buffer) - position and (extra := next(texts, None)) is not None:
            text += extra
        buffer, position = buffer[position:] + (text or ""), 0
        return not ended

    def next_character() -> str:
        nonlocal position, line
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                line += buffer[position] == "\n"
                position += 1
            if position < len(buffer):
                return buffer[position]
            if not more():
                return ""

    def element() -> Any:
        nonlocal position, line
        while True:
            try:
                value, end = _DECODER.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # cut off by the end of the buffer, or wrong? A string's error stands where the string begins
                if not ended and (error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16):
                    if len(buffer) - position > MAX_LINE_BYTES:
                        raise ValueError(f"{path}:{line}: this row is longer than {MAX_LINE_BYTES >> 20} MiB") from None
                    more()
                    continue
                at = line + buffer.count("\n", position, error.pos)
                column = error.pos - buffer.rfind("\n", 0, error.pos)
                raise ValueError(f"{path}:{at}: not valid JSON: {error.msg} at column {column}") from None
            except RecursionError:
                raise ValueError(f"{path}:{line}: JSON nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"{path}:{line}: not valid JSON: {error}") from None
            if end == len(buffer) and not ended:  # 12 may go on as 123
                more()
                continue
            line += buffer.count("\n", position, end)
            position = end
            return value

    def rows() -> Iterator[Decoded]:
        nonlocal position
        next_character()
        position += 1  # the opening bracket
        while (found := next_character()) != "]":
            if not found:
                raise ValueError(f"{path}:{line}: the array is not closed: the file was cut off")
            yield line, element()
            separator = next_character()
            if separator == ",":
                position += 1
                if next_character() == "]":
                    raise ValueError(f"{path}:{line}: a comma before the closing ]; remove it")
            elif separator != "]":
                raise ValueError(f"{path}:{line}: expected , or ] after a row, found {show(separator or 'the end')}")
        position += 1  # the closing bracket
        if rest := next_character():
            raise ValueError(f"{path}:{line}: expected the end of the file after ], found {show(rest)}")

    yield from _in_chunks(rows(), raw)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found[TWICE] = next(key for key in keys if keys.count(key) > 1)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


# ---- tables


def _csv(
    path: Path, texts: Iterator[str], raw: IO[bytes], delimiter: str | None, note: Callable[[str], None]
) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _split_lines(texts)
    head = next(lines, "")
    if delimiter is None:
        delimiter = max(",;\t", key=head.count)
        if delimiter != ",":
            note(f"{path} is read as separated by {show(delimiter)}")
    reader = csv.reader(_first(head, lines), delimiter=delimiter, strict=True)

    def rows() -> Iterator[Decoded]:
        try:
            names = next(reader, [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}:1: the column {show(twice[0])} stands twice; rename one")
            if names and not all(name.strip() for name in names):
                raise ValueError(f"{path}:1: a column has no name; the first line names the columns")
            before = reader.line_num
            for fields in reader:
                start, before = before + 1, reader.line_num
                if not fields:
                    continue
                if len(fields) != len(names):
                    yield start, BadRow(f"has {len(fields)} columns, the first line names {len(names)}")
                else:
                    yield start, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"{path}:{reader.line_num}: not valid CSV: {error}; a text with a quote or line break is written"
                ' in quotes, and a quote in it twice: "say ""hi"""'
            ) from None

    yield from _in_chunks(rows(), raw)


def _split_lines(texts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        whole, newline, tail = text.rpartition("\n")
        if newline:
            yield from (f"{line}\n" for line in (rest + whole).split("\n"))
            rest = tail
        else:
            rest += text
    if rest:
        yield rest


def _first(head: str, lines: Iterator[str]) -> Iterator[str]:
    if head:
        yield head
    yield from lines


def _parquet(path: Path, raw: IO[bytes]) -> Iterator[Chunk]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(raw)
        total, size, done = table.metadata.num_rows, path.stat().st_size, 0
        for batch in table.iter_batches(batch_size=CHUNK_ROWS):
            values = batch.to_pylist()
            rows: list[Decoded] = list(enumerate(values, done + 1))
            done += len(values)
            yield Values(rows, size * done // total)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: Parquet cannot be read: {' '.join(str(error).split())}") from None


def dataset_chunks(dataset: Any) -> Iterator[Chunk]:
    """Yield the rows of a datasets.Dataset."""
    done = 0
    for columns in dataset.iter(batch_size=CHUNK_ROWS):
        names = list(columns)
        values = [dict(zip(names, fields, strict=True)) for fields in zip(*columns.values(), strict=True)]
        yield Values(list(enumerate(values, done + 1)), 0)
        done += len(values)


def _in_chunks(rows: Iterator[Decoded], raw: IO[bytes]) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        yield Values(some, _position(raw))


def show(value: Any, width: int = 60) -> str:
    """Return a value as a message shows it: JSON on one line, cut to width characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (RecursionError, ValueError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= width else text[: width - 3] + "..."


def _show_bytes(head: bytes) -> str:
    return repr(head[:16])[1:] if head else ""
