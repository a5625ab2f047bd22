"""The encoding of a text file, and its blocks of bytes as text."""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

_MARKS = {  # UTF-32's begin with UTF-16's, so they come first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def named(path: Path, head: bytes, encoding: str | None) -> str | None:
    """Return the encoding that a file's mark (BOM) gives, else the config's. head: the file's first bytes.
    Raises: ValueError when there is no such encoding, or UTF-16 without a mark is not named in the config."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    if encoding:
        try:
            "".encode(encoding)
            codecs.getincrementaldecoder(encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"data.encoding={encoding}: no such encoding; known: utf-8, gb18030, utf-16 ..."
            ) from None
    elif b"\0" in head[:2]:
        byte_order = "le" if head[0] else "be"
        raise ValueError(
            f"{path}: seems to be UTF-16 text without its mark; write data.encoding: utf-16-{byte_order}"
        )
    return encoding


def find(path: Path, read: Callable[[], Iterator[bytes]], note: Callable[[str], None]) -> str:
    """Return utf-8, or gb18030 for a file that decodes so and reads like Chinese. Raises: ValueError.
    read: gives the file's blocks from the start; note: is called with a line when it is gb18030."""
    if _is_utf8(path, read()):
        return "utf-8"
    # Latin-1 and Big5 decode as GB18030, too, but to characters that hardly anyone uses
    common = _common_share(path, read())
    if common is not None and common > 0.9:
        note(f"{path} is read as GB18030; if its text looks wrong, set data.encoding")
        return "gb18030"
    raise ValueError(
        f"{path}: its text is neither UTF-8 nor GB18030; name its encoding, as data.encoding: big5"
    )


def _common_share(path: Path, blocks: Iterator[bytes]) -> float | None:
    """Return GB2312's share of the characters that are not ASCII; None when it is not GB18030 text."""
    foreign = common = 0
    try:
        for text in decode(path, blocks, "gb18030"):
            ascii_characters = len(text.encode("ascii", "ignore"))
            foreign += len(text) - ascii_characters
            common += (len(text.encode("gb2312", "ignore")) - ascii_characters) // 2
    except _WrongEncodingError:
        return None
    return common / foreign if foreign else 0.0


def _is_utf8(path: Path, blocks: Iterator[bytes]) -> bool:
    try:
        for _ in decode(path, blocks, "utf-8"):
            pass
    except _WrongEncodingError:
        return False
    return True


class _WrongEncodingError(UnicodeError):
    pass


def decode(path: Path, blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """Yield the blocks as text, without a mark (BOM). Raises: ValueError naming the byte that is wrong."""
    decoder = codecs.getincrementaldecoder(encoding)()
    done, first = 0, True
    try:
        for block in blocks:
            start = done - len(decoder.getstate()[0])  # bytes of a character that the last block began
            text = decoder.decode(block)
            done += len(block)
            if text:
                yield text.removeprefix("\ufeff") if first else text
                first = False
    except UnicodeError as error:
        start += error.start if isinstance(error, UnicodeDecodeError) else 0
        name, cure = encoding, "set data.encoding to what it is"
        if codecs.lookup(encoding).name == "utf-8":
            name, cure = "UTF-8", "if it is another encoding, name it: data.encoding: gb18030"
        raise _WrongEncodingError(f"{path}: not {name} text at byte {start:,}; {cure}") from None
    try:
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise ValueError(f"{path}: ends within a character: it was cut off; make the file again") from None
