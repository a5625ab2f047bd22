"""Rows of plain text (.txt): its paragraphs, or its lines where no blank line divides them."""

import io
import re
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import IO

from qwenlora.data.chunks import Decoded, Values, in_chunks
from qwenlora.data.tables import split_lines

# {"text" ..., {'text' ..., [{ ..., [[ ... or ["...: a file of JSON, whatever its name
_JSON = re.compile(r"""\s*(\{\s*["'}]|\[\s*[\[{"\]])""")


def is_json(head: bytes, encoding: str | None) -> bool:
    """Return whether a file holds JSON. head: its first bytes."""
    return bool(_JSON.match(head.decode(encoding or "utf-8", errors="ignore").removeprefix("\ufeff")))


def text_rows(
    path: Path, texts: Iterator[str], raw: IO[bytes], note: Callable[[str], None]
) -> Iterator[Values]:
    """Yield {"text": ...} for each paragraph, or line. texts: the file's, decoded."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    decoded = (newlines.decode(text) for text in texts)
    head = next(decoded, "")
    has_paragraphs = any(not line.strip() for line in head.strip().split("\n"))
    if head:
        note(
            f"{path} is read as plain text: each {'paragraph' if has_paragraphs else 'line'} is a row; for"
            ' other rows, write {"text": "..."} on each line'
        )

    def rows() -> Iterator[Decoded]:
        lines = enumerate(split_lines(chain([head], decoded)), 1)
        for is_blank, group in groupby(lines, key=lambda line: not line[1].strip()):
            if is_blank:
                continue
            if has_paragraphs:
                first, line = next(group)
                text = line + "".join(line for _, line in group)
                yield first, {"text": text.removesuffix("\n")}
            else:
                yield from ((number, {"text": line.removesuffix("\n")}) for number, line in group)

    yield from in_chunks(rows(), raw)
