"""Files of chat rows, read into one shape: `list[Message]`.

`read_rows(["my.jsonl"])` knows the shapes people have (SHAPES below) in .json (an array, or lines) and .jsonl files.
A row that cannot be trained is refused with its file and line. Tokens are chat.py's.
"""

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

SHAPES = """known shapes of a row:
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"instruction": "...", "output": "..."}
  {"instruction": "...", "input": "...", "output": "..."}"""

UNKNOWN_SHAPE = "unknown shape"
TWICE = "\0twice"  # a JSON key that no file has: marks an object in which another key stands twice
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's own: text that holds one would forge a turn
# keys that change what a row means, and that nothing here would heed
NOT_READ_IN_ROWS = ("history", "tools", "functions", "chosen", "rejected")
NOT_READ_IN_TURNS = ("tool_calls", "function_call", "reasoning_content", "weight", "loss")
# empty lines before a reply would melt into one token with the line break that ends the turn's header, a token that no
# prompt for an answer ends with
_LEADING_LINES = re.compile(r"^\s*[\r\n]")
EXAMPLES = {"train": "train.jsonl", "eval": "rephrased.jsonl"}
SHOWN_BAD_ROWS = 20


class Message(TypedDict):
    """One turn. role: system, user or assistant."""

    role: str
    content: str


class Row(NamedTuple):
    """One conversation and where it stands, as `file:line`."""

    place: str
    messages: list[Message]


def source_files(source: str | list[str], side: str) -> list[Path]:
    """Return the files that `data.train` or `data.eval` names. side: train or eval.

    Raises: ValueError naming the first that is not a readable file.
    """
    files = []
    for name in [source] if isinstance(source, str) else source:
        if name == "example":
            files.append(Path(str(resources.files("qwenlora.data") / "examples" / EXAMPLES[side])))
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            raise ValueError(f"data.{side}={name} is a folder; name the files in it")
        if not path.is_file():
            raise ValueError(f"data.{side}={name}: no such file (looked for {path.absolute()})")
        files.append(path)
    return files


def read_rows(files: list[Path]) -> list[Row]:
    """Return every row of the files, in order.

    Raises: ValueError when a file is not JSON, is empty, or a row cannot be trained; it lists the first 20 bad rows.
    """
    rows: list[Row] = []
    bad: list[str] = []
    for path in files:
        before = len(rows) + len(bad)
        for line, value in _values(path):
            place = f"{path}:{line}"
            try:
                rows.append(Row(place, to_messages(value)))
            except ValueError as error:
                bad.append(f"{place}: {error}")
        if len(rows) + len(bad) == before:
            raise ValueError(f"{path} is empty: it has no rows")
    if bad:
        raise ValueError(_report(bad, len(rows) + len(bad)))
    return rows


def _report(bad: list[str], total: int) -> str:
    help_ = f"\n{SHAPES}" if any(UNKNOWN_SHAPE in line for line in bad) else ""
    reasons = {line.split(": ", 1)[1] for line in bad}
    if len(bad) == total > 1 and len(reasons) == 1:  # one sentence says it all
        return f"{bad[0]}; the same for all {total} rows{help_}"
    shown = "\n  ".join(bad[:SHOWN_BAD_ROWS])
    more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{len(bad)} of {total} rows cannot be trained:\n  {shown}{more}{help_}"


def to_messages(value: Any) -> list[Message]:
    """Return a row's turns. Raises: ValueError saying what is wrong with the row."""
    if not isinstance(value, dict):
        raise ValueError(f"{UNKNOWN_SHAPE}: a row must be a JSON object, found {_show(value)}")
    if TWICE in value:
        raise ValueError(f"has the key {value[TWICE]} twice; keep one")
    for key in NOT_READ_IN_ROWS:
        if value.get(key):
            raise ValueError(f"{key} is not read here: put it into the turns, or remove it from the row")
    chats = [value[key] for key in ("conversations", "messages") if value.get(key) is not None]
    if len(chats) > 1:
        raise ValueError("has both conversations and messages; remove one of them")
    if chats:
        messages = _from_turns(chats[0])
    elif "instruction" in value and "output" in value:
        messages = _from_instruction(value)
    else:
        raise ValueError(f"{UNKNOWN_SHAPE} with keys {', '.join(value) or '(none)'}")
    system = value.get("system")
    if isinstance(system, str) and system:
        messages.insert(0, Message(role="system", content=system))
    elif system:
        raise ValueError(f"system must be text, found {_show(system)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant turn: there is nothing to learn from")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip():
            raise ValueError(f"turn {number} ({message['role']}) is empty")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"turn {number} is a system turn; only the first may be one")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"turn {number} contains half a character at {error.start}: {error.reason}") from None
        for markup in (TURN_START, TURN_END):
            if markup in message["content"]:
                raise ValueError(f"turn {number} contains {markup}, which would forge a turn; remove it")
    return messages


def _from_turns(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected a list of turns, found {_show(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} must be an object, found {_show(turn)}")
        if TWICE in turn:
            raise ValueError(f"turn {number} has the key {turn[TWICE]} twice; keep one")
        role = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"turn {number} has role {_show(role)}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"turn {number} ({role}) must be text, found {_show(content)}")
        for key in NOT_READ_IN_TURNS:
            if turn.get(key) is not None:
                raise ValueError(f"turn {number} has {key}, which is not read here: put it into the text, or remove it")
        if ROLES[role] == "assistant":
            content = _LEADING_LINES.sub("", content)
        messages.append(Message(role=ROLES[role], content=content))
    return messages


def _from_instruction(row: dict[str, Any]) -> list[Message]:
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key, ""), str) and not (key == "input" and row[key] is None):
            raise ValueError(f"{key} must be text, found {_show(row[key])}")
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    answer = _LEADING_LINES.sub("", row["output"])
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for each row of a JSON array or JSON Lines file; which it is, its first character tells."""
    if path.suffix in (".csv", ".tsv", ".parquet", ".gz", ".zst", ".xlsx"):
        raise ValueError(f"{path}: {path.suffix} files are not read; convert it to .jsonl, one JSON object a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text at byte {error.start}; convert it: iconv -f gb18030 -t utf-8 OLD > NEW"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    yield from _array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _decode(path, number, line)[0]


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    line, position = 1, 0

    def skip_space() -> str:
        nonlocal line, position
        while position < len(text) and text[position] in " \t\r\n":
            line += text[position] == "\n"
            position += 1
        return text[position : position + 1]

    skip_space()
    position += 1  # the opening bracket
    while skip_space() != "]" or position == len(text):
        start = line
        value, end = _decode(path, line, text, position)
        line += text.count("\n", position, end)
        position = end
        yield start, value
        separator = skip_space()
        if separator == ",":
            position += 1
        elif separator != "]":
            raise ValueError(f"{path}:{line}: expected , or ] after a row, found {_show(separator or 'the end')}")
    position += 1  # the closing bracket
    if rest := skip_space():
        raise ValueError(f"{path}:{line}: expected the end of the file after ], found {_show(rest)}")


def _decode(path: Path, line: int, text: str, position: int = 0) -> tuple[Any, int]:
    try:
        if position:
            return _DECODER.raw_decode(text, position)
        return _DECODER.decode(text), len(text)
    except json.JSONDecodeError as error:
        extra = text.count("\n", position, error.pos)
        raise ValueError(f"{path}:{line + extra}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: JSON nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found[TWICE] = next(key for key in keys if keys.count(key) > 1)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
