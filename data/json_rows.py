"""Rows in JSON: Lines, which other processes may decode, and arrays, read element by element.

What is wrong is said with its line and column, and in the words of what people write most.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import MAX_LINE_BYTES, Decoded, Values, in_chunks, position


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


def one_object(head: bytes) -> str:
    """Return what is wrong with a file that begins with an object over several lines; empty when it does
    not."""
    text = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""  # wrong, which its line will be told, or longer than this
    if not isinstance(value, dict) or "\n" not in text[:end]:
        return ""
    lists = [
        key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)
    ]
    if (
        lists
        and not text[end:].strip()
        and "content" not in value[lists[0]][0]
        and "value" not in value[lists[0]][0]
    ):
        return (
            f"is one JSON object, its rows are in {lists[0]}; write them alone: jq -c '.{lists[0]}[]' old >"
            " new"
        )
    return "has an object over several lines; one row a line: jq -c . old > new, or an array: [{...}, {...}]"


def lines(path: Path, blocks: Iterator[bytes], raw: IO[bytes]) -> Iterator[Lines]:
    """Yield JSON Lines in chunks of whole lines, not decoded yet."""
    line, rest = 1, [b""]
    for block in blocks:
        whole, newline, tail = block.rpartition(b"\n")
        if newline:
            blob = b"".join([*rest, whole])
            yield Lines(line, blob, position(raw))
            line += blob.count(b"\n") + 1
            rest = [tail]
        else:
            rest.append(block)
            if sum(map(len, rest)) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{line}: this line is longer than {MAX_LINE_BYTES >> 20} MiB; one row a line"
                )
    if any(rest):
        yield Lines(line, b"".join(rest), position(raw))


def array(path: Path, texts: Iterator[str], raw: IO[bytes]) -> Iterator[Values]:
    """Read a JSON array element by element, however long it is."""
    buffer, position, line, ended = "", 0, 1, False
    dropped = 0  # characters of the line that the buffer begins in the middle of

    def more() -> bool:
        nonlocal buffer, position, ended, dropped
        text = next(texts, None)
        ended = text is None
        # at least twice the row so far, so that a long row is not tried over and over
        while (
            text is not None
            and len(text) < len(buffer) - position
            and (extra := next(texts, None)) is not None
        ):
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
                        raise ValueError(
                            f"{path}:{line}: this row is longer than {MAX_LINE_BYTES >> 20} MiB"
                        ) from None
                    more()
                    continue
                if error.msg.startswith("Unterminated string") or not buffer[error.pos :].strip():
                    raise ValueError(f"{path}:{line}: {_CUT_OFF} in the row that begins here") from None
                at = line + buffer.count("\n", position, error.pos)
                newline = buffer.rfind("\n", 0, error.pos)
                column = error.pos - newline + (dropped if newline < 0 else 0)
                raise ValueError(
                    f"{path}:{at}: not valid JSON: {_json_problem(error)} at column {column}"
                ) from None
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
                raise ValueError(
                    f"{path}:{line}: not valid JSON: expected , or ] after a row, found {show(separator)}"
                )
        position += 1  # the closing bracket
        if rest := next_character():
            raise ValueError(
                f"{path}:{line}: expected the end of the file after the array's ], found {show(rest)}; a file"
                " is one array of objects, or one object a line"
            )

    yield from in_chunks(rows(), raw)


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
