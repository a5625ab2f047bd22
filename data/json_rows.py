"""Rows in JSON: lines, which other processes may decode, and arrays, read element by element."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from qwenlora.data.bad_row import BadRow, or_bad, show
from qwenlora.data.chunks import MAX_LINE_BYTES, Decoded, JsonObject, Values, in_chunks, position


class Lines(NamedTuple):
    """Whole lines of JSON. first: the number of the first line; read: bytes of the file read so far."""

    first: int
    blob: bytes
    read: int

    def values(self) -> Iterator[Decoded]:
        """Yield each row that is not blank."""
        for number, line in enumerate(self.blob.split(b"\n"), self.first):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield number, or_bad(_decode_line, line)


def decode_json(text: str) -> object:
    """Return the value of a JSON text. Raises: BadRow saying what is wrong, and in which column."""
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


def _decode_line(line: bytes) -> object:
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
    """Return what is wrong: the decoder's message, or a plainer one for the most common mistakes."""
    character, before = error.doc[error.pos : error.pos + 1], error.doc[: error.pos].rstrip()[-1:]
    if character in ("}", "]") and before == ",":
        return f"a comma before {character}"
    if character == "'" and error.msg.startswith("Expecting"):
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
        return ' (plain text? name the file .txt, or write rows: {"text": "..."})'
    return ""


def one_object(head: bytes) -> str:
    """Return the problem of a file whose head (first bytes) is an object over several lines; empty if not."""
    text = head.decode(errors="ignore").removeprefix("\ufeff").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""  # longer than the head, or not JSON: then its line is refused when it is read
    if not isinstance(value, dict) or "\n" not in text[:end]:
        return ""
    lists = (
        key for key, item in value.items() if isinstance(item, list) and isinstance((item or [0])[0], dict)
    )
    key = next(lists, None)
    is_rows = key is not None and not {"content", "value"} & value[key][0].keys()  # and are no turns
    if is_rows and not text[end:].strip():
        return f"is one JSON object, its rows are in {key}; write them alone: jq -c '.{key}[]' old > new"
    return "has an object over several lines; one row a line: jq -c . old > new, or an array: [{...}, {...}]"


def holds_lists_of_turns(head: str) -> bool:
    """Return whether the arrays of a file are rows, each a list of turns. head: its first characters."""
    lenient = json.JSONDecoder()
    start = len(head) - len(head.lstrip())
    first = _WHITE_SPACE.match(head, start + 1)
    assert first is not None, "it matches nothing, too"
    try:
        turn, _ = lenient.raw_decode(head, first.end())
    except (ValueError, RecursionError):
        return False  # longer than the head, or not JSON: the array's reader says what is wrong
    if not isinstance(turn, dict):
        return False
    if turn.keys() >= {"role", "content"} or turn.keys() >= {"from", "value"}:
        return True
    try:  # other keys, and another array after the first: lines of arrays
        _, end = lenient.raw_decode(head, start)
    except (ValueError, RecursionError):
        return False
    return head[end:].lstrip()[:1] == "["


def lines(path: Path, blocks: Iterator[bytes], raw: IO[bytes]) -> Iterator[Lines]:
    """Yield JSON Lines in chunks of whole lines, not decoded yet. blocks: the file's, decompressed."""
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
    """Yield the elements of a JSON array, however long it is. texts: the file's, decoded."""
    yield from in_chunks(_ArrayReader(path, texts).rows(), raw)


def arrays(path: Path, texts: Iterator[str], raw: IO[bytes]) -> Iterator[Values]:
    """Yield whole JSON arrays, one after the other. texts: the file's, decoded."""
    yield from in_chunks(_ArrayReader(path, texts).arrays(), raw)


class _ArrayReader:
    """Reads a JSON array element by element from a buffer, to which it adds text as it needs it."""

    def __init__(self, path: Path, texts: Iterator[str]) -> None:
        self.path, self.texts = path, texts
        self.buffer, self.position, self.ended = "", 0, False
        self.line = 1  # at the position
        self.dropped = 0  # characters of the buffer's first line that are before the buffer

    def rows(self) -> Iterator[Decoded]:
        """Yield (line, value) for each element. Raises: ValueError naming the line."""
        self._next_character()
        self.position += 1  # the opening bracket
        while (character := self._next_character()) != "]":
            if not character:
                raise self._error(_CUT_OFF)
            yield self.line, self._element()
            separator = self._next_character()
            if separator == ",":
                self.position += 1
                if self._next_character() == "]":
                    raise self._error("a comma before the closing ]; remove it")
            elif separator and separator != "]":
                raise self._error(f"not valid JSON: expected , or ] after a row, found {show(separator)}")
        self.position += 1  # the closing bracket
        if rest := self._next_character():
            raise self._error(
                f"expected the end of the file after the array's ], found {show(rest)}; a file is one array"
                " of objects, or one object a line"
            )

    def arrays(self) -> Iterator[Decoded]:
        """Yield (line, array) for each array of the file. Raises: ValueError naming the line."""
        while character := self._next_character():
            if character != "[":
                raise self._error(f"expected a list of turns, as before it, found {show(character)}")
            yield self.line, self._element()

    def _more(self) -> bool:
        """Add text to the buffer, and drop what is before the position; false at the end of the file."""
        text = next(self.texts, None)
        self.ended = text is None
        # at least twice the row so far, so that a long row is not tried over and over
        while (
            text is not None
            and len(text) < len(self.buffer) - self.position
            and (extra := next(self.texts, None)) is not None
        ):
            text += extra
        newline = self.buffer.rfind("\n", 0, self.position)
        self.dropped = self.position - newline - 1 if newline >= 0 else self.dropped + self.position
        self.buffer, self.position = self.buffer[self.position :] + (text or ""), 0
        return not self.ended

    def _move(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.position, end)
        self.position = end

    def _next_character(self) -> str:
        """Move to the next character that is no white space, and return it; empty at the end of the file."""
        while True:
            space = _WHITE_SPACE.match(self.buffer, self.position)
            assert space is not None, "it matches nothing, too"
            self._move(space.end())
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._more():
                return ""

    def _element(self) -> object:
        """Return the value at the position, or the BadRow that it is, and move behind it."""
        while True:
            try:
                value, end = _decode_at(self.buffer, self.position)
            except json.JSONDecodeError as error:
                if not self._may_be_cut_off(error):
                    raise self._invalid(error) from None
                if len(self.buffer) - self.position > MAX_LINE_BYTES:
                    raise self._error(f"this row is longer than {MAX_LINE_BYTES >> 20} MiB") from None
                self._more()
                continue
            except RecursionError:
                raise self._error(_TOO_DEEP) from None
            except ValueError:
                raise self._error(_TOO_LONG) from None
            if end == len(self.buffer) and not self.ended:  # 12 may go on as 123
                self._more()
                continue
            self._move(end)
            return value

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Return whether the buffer's end may cause the error. An open string's error is at its start."""
        at_end = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
        return at_end and not self.ended

    def _invalid(self, error: json.JSONDecodeError) -> ValueError:
        if error.msg.startswith("Unterminated string") or not self.buffer[error.pos :].strip():
            return self._error(f"{_CUT_OFF} in the row that begins here")
        newline = self.buffer.rfind("\n", 0, error.pos)
        column = error.pos - newline + (self.dropped if newline < 0 else 0)
        self._move(error.pos)
        return self._error(f"not valid JSON: {_json_problem(error)} at column {column}")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}:{self.line}: {problem}")


def _decode_at(text: str, position: int) -> tuple[object, int]:
    """Return the value that begins at a position, or the BadRow that it is, and where it ends."""
    try:
        return _STRICT.raw_decode(text, position)
    except BadRow as error:
        return error, _LENIENT.raw_decode(text, position)[1]


def _object(pairs: list[tuple[str, object]]) -> JsonObject:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(f"has the key {show(twice)} twice in one object; keep one")
    return values


_STRICT, _LENIENT = json.JSONDecoder(object_pairs_hook=_object), json.JSONDecoder()
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_TOO_DEEP = "JSON nested too deeply"
_TOO_LONG = "holds a number of more than 4,300 digits; if it is meant, write it as text"  # Python's own limit
_CUT_OFF = "the array is not closed: the file was cut off"
