"""Damages data files at random and reads them: whatever is inside, the reader gives rows or a ValueError.

`python tests/data/fuzz_reader.py --seconds 60 [--seed 7]` says how many inputs had which outcome, and ends
with 1 when there was another exception; the file that caused it is kept and named. Half of the inputs are
damaged bytes with random names, half are valid rows with a random value in a random place.
"""

import argparse
import copy
import gzip
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from qwenlora.configs.schema import Data
from qwenlora.data import sources, tokenise
from qwenlora.data.bad_row import BadRow
from qwenlora.data.rows import Row, to_row
from qwenlora.data.shapes import RowOptions, shape_of

TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "Asia/Shanghai"}'}}
ROWS: list[dict[str, Any]] = [
    {
        "conversations": [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "三点。"}],
        "system": "简短。",
    },
    {
        "messages": [{"role": "user", "content": "几点？"}, {"role": "assistant", "content": "三点。"}],
        "id": 7,
    },
    {"instruction": "翻译", "input": "hello", "output": "你好", "history": [["在？", "在。"]], "system": ""},
    {"query": "几点？", "response": "三点。"},
    {"prompt": "几点？", "completion": "三点。"},
    {"text": "人之初，性本善。"},
    {
        "messages": [
            {"role": "user", "content": "几点？"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "15:00"},
            {"role": "assistant", "content": "三点。", "reasoning_content": "15 减 12"},
        ],
        "tools": [TOOL],
    },
    {
        "conversations": [
            {"from": "human", "value": "几点？"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
            {"from": "observation", "value": "15:00"},
            {"from": "gpt", "value": "三点。"},
        ],
        "tools": json.dumps([TOOL]),
    },
]
NAMES = (
    "my.json",
    "my.jsonl",
    "my.csv",
    "my.tsv",
    "my.parquet",
    "my.jsonl.gz",
    "my.csv.gz",
    "my.json.zst",
    "my.txt",
    "my",
)
MAGIC = (
    b"\x1f\x8b\x08\0",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"PK\x03\x04",
    b"[",
    b"{",
)
KEYS = (
    "messages",
    "from",
    "value",
    "role",
    "content",
    "tools",
    "name",
    "arguments",
    "chosen",
    "rejected",
    "label",
    "text",
)
TEXTS = (
    "",
    " ",
    "user",
    "assistant",
    "function_call",
    "<|im_end|>",
    "\ud83d",
    "\0",
    "\n",
    "[]",
    "{}",
    "[1]",
    "null",
    "NaN",
    "\u2028",
)
ENCODINGS = (None,) * 5 + ("gb18030", "utf-16", "utf-8", "latin-1", "utf-7", "idna", "punycode", "x")


class Damage:
    """What can be done to bytes and rows. random: of one input."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def file(self) -> bytes:
        """Return a file, mostly damaged."""
        content = self._whole()
        for _ in range(self.random.choice((0, 1, 1, 2, 5))):
            content = self._damaged(content)
        return content

    def value(self, depth: int = 0) -> Any:
        """Return any JSON value."""
        kind = self.random.randrange(10 if depth < 4 else 8)
        if kind == 8:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        if kind == 9:
            return {self.random.choice(KEYS): self.value(depth + 1) for _ in range(self.random.randrange(4))}
        if kind == 7 and self.random.random() < 0.1:
            return self._deep()
        numbers = (None, True, False, 0, -1, 1.5, 10**400, float("nan"), float("inf"))
        return self.random.choice(
            (self.random.choice(numbers), self.random.choice(TEXTS), self.random.choice(KEYS))
        )

    def row(self) -> Any:
        """Return a row with random values in up to three places."""
        row: Any = [
            copy.deepcopy(self.random.choice(ROWS))
        ]  # in a list, so that the row itself is a place, too
        if self.random.random() < 0.2:
            row[0] |= copy.deepcopy(self.random.choice(ROWS))
        for _ in range(self.random.randrange(4)):
            place, key = self.random.choice(list(_places(row)))
            if self.random.random() < 0.2 and isinstance(place, dict):
                place[self.random.choice((*KEYS, *TEXTS))] = place.pop(key)
            elif self.random.random() < 0.1 and place is not row:
                del place[key]
            else:
                place[key] = self.value()
        return row[0]

    def _deep(self) -> Any:
        value: Any = 1
        for _ in range(self.random.choice((50, 95, 150, 300, 900, 950, 980, 2000))):
            value = self.random.choice(([value], {"a": value}))
        return value

    def _whole(self) -> bytes:
        kind = self.random.randrange(8)
        some = (
            [self.random.choice(ROWS)] * self.random.choice((1, 3, 200))
            if kind < 5
            else [self.row() for _ in range(5)]
        )
        if kind in (0, 5):
            content = "".join(
                _json(row) + self.random.choice(("\n", "\r\n", "\n\n")) for row in some
            ).encode()
        elif kind in (1, 6):
            content = f"[{', '.join(map(_json, some))}]".encode()
        elif kind == 2:
            content = self._table(some)
        elif kind == 3:
            content = "".join(
                self.random.choice(('"', ",", ";", "\t", "\n", "\r\n", "a", "三", '""', "text,"))
                for _ in range(60)
            ).encode()
        elif kind == 4:
            content = _parquet(some)
        else:
            content = self.random.choice(MAGIC) + self.random.randbytes(self.random.randrange(300))
        if self.random.random() < 0.2:
            content = content.decode(errors="replace").encode(
                self.random.choice(("gb18030", "utf-16", "utf-16-le", "utf-32"))
            )
        if self.random.random() < 0.2:
            content = self.random.choice((gzip.compress, _zstd))(content)
        return content

    def _table(self, some: list[Any]) -> bytes:
        names = list(some[0])
        cells = [
            [row[name] if isinstance(row[name], str) else _json(row[name]) for name in names] for row in some
        ]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [names, *cells]]
        return "\n".join(quoted).encode()

    def _damaged(self, content: bytes) -> bytes:
        start, end = sorted(self.random.randrange(len(content) + 1) for _ in range(2))
        kind = self.random.randrange(6)
        if kind == 0 and content:
            at = self.random.randrange(len(content))
            return content[:at] + bytes([content[at] ^ 1 << self.random.randrange(8)]) + content[at + 1 :]
        if kind == 1:
            return content[:end]
        if kind == 2:
            return content[:start] + content[end:]
        if kind == 3:
            return content[:end] + content[start:]
        if kind == 4:
            return (
                content[:start]
                + self.random.choice((*MAGIC, b"\0\0", b'"', b",", b"\n", b"\xff", b"\\u", b"9" * 5000))
                + content[start:]
            )
        return content[:start] + _json(self.value()).encode() + content[end:]


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 3000


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def _parquet(some: list[Any]) -> bytes:
    file = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(some), file)
    return file.getvalue().to_pybytes()


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every place in a value that is not very deep."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list) and depth < 20:
            yield from _places(value[key], depth + 1)


def try_file(path: Path, encoding: str | None, format_: str) -> str:
    """Return what became of a file: read, or refused."""
    try:
        found = sources.find(Data(train=str(path), encoding=encoding, format=format_))
        for _, _, line, row in tokenise.read_rows(found):
            _look(line, row)
    except ValueError as error:
        _check_reason(error)
        return "refused"
    return "read"


def try_row(value: Any, options: RowOptions) -> str:
    """Return what became of a row: read, or refused."""
    try:
        row = to_row(1, value, shape_of(value, options), options)
    except BadRow as error:
        _look(1, error)
        return "refused"
    _look(1, row)
    return "read"


def _look(line: int, row: Row | BadRow) -> None:
    assert line > 0
    if isinstance(row, BadRow):
        _check_reason(row)
    else:
        assert len(row.digest) == 16
        json.dumps([row.messages, row.tools, row.text], ensure_ascii=False, allow_nan=False).encode()


def _check_reason(error: ValueError) -> None:
    if not str(error).isprintable() or not 0 < len(str(error)) < 1500:
        raise RuntimeError(f"no line that can be shown: {str(error)!r}")


def fuzz(seed: int, seconds: float, keep: Path | None = None) -> Counter[str]:
    """Return how many inputs were read, refused and failed. keep: a folder for those that failed."""
    outcomes: Counter[str] = Counter(failed=0)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            number = outcomes.total()
            damage = Damage(f"{seed} {number}")
            format_ = damage.random.choice(("auto", "auto", "auto", "chat", "text", "alpaca"))
            try:
                if number % 2:
                    content = _json(value := damage.row()).encode()
                    outcome = try_row(
                        value, RowOptions(format_, {"name": "role"} if damage.random.random() < 0.1 else {})
                    )
                else:
                    content, path = damage.file(), Path(folder) / damage.random.choice(NAMES)
                    path.write_bytes(content)
                    outcome = try_file(path, damage.random.choice(ENCODINGS), format_)
            except Exception:  # what this looks for
                outcome = "failed"
                if outcomes["failed"] >= 20:
                    return outcomes + Counter(failed=1)  # enough to look at
                where = (keep or Path(tempfile.gettempdir())) / f"fuzz-{seed}-{number}"
                where.write_bytes(content)
                trace = traceback.format_exc(limit=-3).encode("ascii", "backslashreplace").decode()
                print(f"input {number} of seed {seed}, kept as {where}:\n{trace}")
            outcomes[outcome] += 1
    return outcomes


def main() -> None:
    """Fuzz for a while, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--keep", type=Path, help="folder for inputs that failed")
    options = parser.parse_args()
    outcomes = fuzz(options.seed, options.seconds, options.keep)
    print(
        f"seed {options.seed}: {outcomes.total():,} inputs: "
        + ", ".join(f"{n:,} {what}" for what, n in outcomes.items())
    )
    sys.exit(outcomes["failed"] > 0)


if __name__ == "__main__":
    main()
