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
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

CHUNK_BYTES = 2**20
CHUNK_ROWS = 1000
MAX_LINE_BYTES = 2**28
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


class BadRow(ValueError):  # noqa: N818 (it is a row, and is passed on as one)
    """A row that cannot be trained, though the rows after it can be read. Its reason is one line that can be shown."""

    def __init__(self, reason: str) -> None:
        super().__init__(_printable(reason))


Decoded = tuple[int, Any]  # line, and the row's value or the BadRow that it is


class Lines(NamedTuple):
    """Whole lines of JSON. first: the number of the first one; read: bytes of the file read so far."""

    first: int
    blob: bytes
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row that is not blank."""
        for number, line in enumerate(self.blob.split(b"\n"), self.first):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    yield number, _decode_line(line)
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
        yield from _parquet(path, raw)
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
        raise ValueError(f"{path}: seems to be UTF-16 text without its mark; write data.encoding: utf-16-{byte_order}")
    if kind in (".csv", ".tsv"):
        encoding = encoding or _find_encoding(path, compression, note)
        yield from _csv(path, _text(path, blocks, encoding), raw, "\t" if kind == ".tsv" else None, note)
        return
    if encoding and codecs.lookup(encoding).name != "utf-8":
        blocks, head = _peek(text.encode() for text in _text(path, blocks, encoding))
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[":
        yield from _array(path, _text(path, blocks, "utf-8"), raw)
        return
    blocks, head = _peek(blocks, CHUNK_BYTES)
    if problem := _one_object(head):
        raise ValueError(f"{path}: {problem}")
    yield from _lines(path, blocks, raw)


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
            f"{path}: {compression} data is cut off or damaged after {size:,} bytes ({error}); make the file again"
        ) from None


def _position(raw: IO[bytes]) -> int:
    """Return the bytes read so far; 0 where the decompressor has closed the file."""
    return 0 if raw.closed else raw.tell()


def _peek(stream: Iterator[bytes], size: int = _HEAD_BYTES) -> tuple[Iterator[bytes], bytes]:
    """Return the stream, whole, and its first bytes: at least size of them after white space, if it has them."""
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
            raise ValueError(f"data.encoding={encoding}: no such encoding; known: utf-8, gb18030, utf-16 ...") from None
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
        if common > 0.9 * foreign:  # Latin-1 and Big5 decode as well, but to characters that hardly anyone uses
            note(f"{path} is read as GB18030; if its text looks wrong, set data.encoding")
            return encoding
    raise ValueError(f"{path}: its text is neither UTF-8 nor GB18030; name its encoding, as data.encoding: big5")


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


# ---- JSON


def decode_json(text: str) -> Any:
    """Return the value that is written. Raises: BadRow saying what is wrong, and in which column."""
    try:
        return _STRICT.decode(text)
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {_json_problem(error)} at column {error.colno}") from None
    except RecursionError:
        raise BadRow(_TOO_DEEP) from None
    except ValueError:
        raise BadRow(_TOO_LONG) from None


def _decode_line(line: bytes) -> Any:
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8 text at byte {error.start} of the line; if the file is another encoding, name it:"
            " data.encoding: gb18030"
        ) from None
    try:
        return decode_json(text)
    except BadRow as error:
        hint = _json_hint(text) if isinstance(error.__context__, json.JSONDecodeError) else ""
        raise BadRow(f"{error}{hint}") from None


def _json_problem(error: json.JSONDecodeError) -> str:
    """Return the decoder's words; plainer ones for what people write most."""
    found, before = error.doc[error.pos : error.pos + 1], error.doc[: error.pos].rstrip()[-1:]
    if found in ("}", "]") and before == ",":
        return f"a comma before {found}"
    if found == "'" and error.msg.startswith("Expecting"):
        return "text stands in double quotes, not in ' (written by Python's str()? json.dumps writes JSON)"
    if error.msg == "Extra data":
        return f"more follows the {'object' if before == '}' else 'value'} (one row a line)"
    return error.msg[:1].lower() + error.msg[1:].removesuffix(" at")


def _json_hint(text: str) -> str:
    text = text.strip()
    if "\0" in text:
        return " (it holds NUL bytes: the file was not written whole)"
    if text[:1] == "{" and text[-1:] != "}":
        return " (the line was cut off? or an object over several lines? one a line: jq -c . old > new)"
    if text[:1] not in '{["':
        return ' (plain text? a row is an object: {"text": "..."})'
    return ""


def _one_object(head: bytes) -> str:
    """Return what is wrong with a file that begins with an object over several lines; empty when it does not."""
    text = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""  # wrong, which its line will be told, or longer than this
    if not isinstance(value, dict) or "\n" not in text[:end]:
        return ""
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if lists and not text[end:].strip() and "content" not in value[lists[0]][0] and "value" not in value[lists[0]][0]:
        return f"is one JSON object, its rows are in {lists[0]}; write them alone: jq -c '.{lists[0]}[]' old > new"
    return "has an object over several lines; one row a line: jq -c . old > new, or an array: [{...}, {...}]"


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
    dropped = 0  # characters of the line that the buffer begins in the middle of

    def more() -> bool:
        nonlocal buffer, position, ended, dropped
        text = next(texts, None)
        ended = text is None
        # at least twice the row so far, so that a long row is not tried over and over
        while text is not None and len(text) < len(buffer) - position and (extra := next(texts, None)) is not None:
            text += extra
        newline = buffer.rfind("\n", 0, position)
        dropped = position - newline - 1 if newline >= 0 else dropped + position
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
                value, end = _decode_at(buffer, position)
            except json.JSONDecodeError as error:
                # cut off by the end of the buffer, or wrong? A string's error stands where the string begins
                at_end = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
                if at_end and not ended:
                    if len(buffer) - position > MAX_LINE_BYTES:
                        raise ValueError(f"{path}:{line}: this row is longer than {MAX_LINE_BYTES >> 20} MiB") from None
                    more()
                    continue
                if error.msg.startswith("Unterminated string") or not buffer[error.pos :].strip():
                    raise ValueError(f"{path}:{line}: {_CUT_OFF} in the row that begins here") from None
                at = line + buffer.count("\n", position, error.pos)
                newline = buffer.rfind("\n", 0, error.pos)
                column = error.pos - newline + (dropped if newline < 0 else 0)
                raise ValueError(f"{path}:{at}: not valid JSON: {_json_problem(error)} at column {column}") from None
            except RecursionError:
                raise ValueError(f"{path}:{line}: {_TOO_DEEP}") from None
            except ValueError:
                raise ValueError(f"{path}:{line}: {_TOO_LONG}") from None
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
                raise ValueError(f"{path}:{line}: {_CUT_OFF}")
            yield line, element()
            separator = next_character()
            if separator == ",":
                position += 1
                if next_character() == "]":
                    raise ValueError(f"{path}:{line}: a comma before the closing ]; remove it")
            elif separator and separator != "]":
                raise ValueError(f"{path}:{line}: not valid JSON: expected , or ] after a row, found {show(separator)}")
        position += 1  # the closing bracket
        if rest := next_character():
            raise ValueError(
                f"{path}:{line}: expected the end of the file after the array's ], found {show(rest)}; a file is one"
                " array of objects, or one object a line"
            )

    yield from _in_chunks(rows(), raw)


def _decode_at(text: str, position: int) -> tuple[Any, int]:
    """Return the value that begins there, or the BadRow that it is, and where it ends."""
    try:
        return _STRICT.raw_decode(text, position)
    except BadRow as error:
        return error, _LENIENT.raw_decode(text, position)[1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"has the key {show(twice)} twice in one object; keep one")
    return found


_STRICT, _LENIENT = json.JSONDecoder(object_pairs_hook=_object), json.JSONDecoder()
_TOO_DEEP = "JSON nested too deeply"
_TOO_LONG = "holds a number of more than 4,300 digits; if it is meant, write it as text"  # Python's own limit
_CUT_OFF = "the array is not closed: the file was cut off"


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
    reader = csv.reader(chain([head] if head else [], lines), delimiter=delimiter, strict=True)

    def rows() -> Iterator[Decoded]:
        start = 1
        try:
            names = [name.strip() for name in next(filter(None, reader), [])]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}:{start}: the column {show(twice[0])} stands twice; rename one")
            if not all(names):
                raise ValueError(f"{path}:{start}: a column has no name; the first line names the columns")
            start = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(names):
                    yield start, dict(zip(names, fields, strict=True))
                elif fields:
                    yield (
                        start,
                        BadRow(
                            f"has {len(fields)} columns, the first line names {len(names)}; a text with a"
                            f" {show(delimiter)} or a line break is written in double quotes"
                        ),
                    )
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{_csv_problem(start, reader.line_num, str(error))}") from None

    yield from _in_chunks(rows(), raw)


def _csv_problem(start: int, line: int, problem: str) -> str:
    """Return `line: what is wrong`. start: line on which the row begins."""
    if problem == "unexpected end of data":
        return f"{start}: not valid CSV: a double quote is opened in the row that begins here, and never closed"
    if problem.startswith("new-line character"):
        return f"{line}: not valid CSV: lines end with a carriage return alone; convert the file: mac2unix"
    return (
        f"{line}: not valid CSV: {_printable(problem)}; a text with a quote or a line break is put in double quotes,"
        ' and a quote in it twice: "say ""hi"""'
    )


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


def _parquet(path: Path, raw: IO[bytes]) -> Iterator[Chunk]:
    import pyarrow
    from pyarrow import parquet

    done = 0
    try:
        table = parquet.ParquetFile(raw)
        names, total, size = table.schema_arrow.names, table.metadata.num_rows, path.stat().st_size
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {show(twice[0])} stands twice")
        for batch in table.iter_batches(batch_size=CHUNK_ROWS):
            values = batch.to_pylist()
            rows: list[Decoded] = list(enumerate(values, done + 1))
            done += len(values)
            yield Values(rows, size * done // total)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        place = f"{path}: Parquet cannot be read" + (f" after row {done:,}" if done else "")
        raise ValueError(f"{place}: {_arrow_problem(error)}") from None


def dataset_chunks(dataset: Any) -> Iterator[Chunk]:
    """Yield the rows of a datasets.Dataset. Raises: ValueError when they cannot be read."""
    done = 0
    try:
        for columns in dataset.with_format(None).iter(batch_size=CHUNK_ROWS):
            names = list(columns)
            values = [dict(zip(names, fields, strict=True)) for fields in zip(*columns.values(), strict=True)]
            yield Values(list(enumerate(values, done + 1)), 0)
            done += len(values)
    except Exception as error:  # of pyarrow, or of images and sound that cannot be decoded
        raise ValueError(f"the data set cannot be read after row {done:,}: {_arrow_problem(error)}") from None


def _arrow_problem(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "a date is outside the years 1 to 9999; write it as text, or drop the column"
    return f"{_printable(' '.join(str(error).split()))}; make the file again"


def _in_chunks(rows: Iterator[Decoded], raw: IO[bytes]) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        yield Values(some, _position(raw))


# ---- words


def show(value: Any, width: int = 60) -> str:
    """Return a value as a message shows it: JSON on one line, cut to width characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (RecursionError, ValueError, TypeError):  # TypeError: keys of Parquet's maps
        text = f"<{type(value).__name__}>"
    return _printable(text if len(text) <= width else text[: width - 3] + "...")


def show_names(names: Iterable[Any]) -> str:
    """Return keys, or columns, as a message lists them: the first ten."""
    shown = [_printable(name if len(name) <= 40 else name[:37] + "...") for name in map(str, islice(names, 11))]
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "") or "(none)"


def _printable(text: str) -> str:
    """Return text with half characters, line breaks and what moves a terminal's cursor written out."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def _show_bytes(head: bytes) -> str:
    return repr(head[:16])[1:]
