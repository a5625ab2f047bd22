"""The meaning of a row: turns and the tools that they may call, or plain text.

row_io.py reads values, shapes.py finds their shape, turns.py reads turns, chat.py makes tokens.
"""

import hashlib
import json
from typing import NamedTuple

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import JsonObject
from qwenlora.data.nulls import without_nulls
from qwenlora.data.shapes import PAIRS, RowOptions, shape_of_object, with_our_keys
from qwenlora.data.turns import (
    Message,
    check_json,
    check_text,
    check_turns,
    from_json,
    join_calls,
    read_tools,
    read_turns,
    refuse_unused,
    reply,
)
from qwenlora.data.weights import OF_ROWS, read_weight

# keys that would change a row's meaning but are not used -> the key to read them as, if any
_UNUSED = {
    **dict.fromkeys(("images", "videos", "audios", "reasoning_content"), None),
    "system_prompt": "system",
}


class Row(NamedTuple):
    """One row: either messages, and the tools they may call, or text. line: where it stands in its file;
    weight: of its loss (weights.py), besides those of its turns."""

    line: int
    messages: list[Message]
    tools: list[JsonObject] | None = None
    text: str | None = None
    weight: float = 1.0

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal for rows with the same content, however their files write it."""
        parts = [self.messages, self.tools, self.text, *([] if self.weight == 1 else [self.weight])]
        content = json.dumps(parts, ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def to_row(line: int, value: object, shape: str, options: RowOptions) -> Row:
    """Return a row of a known shape. Raises: BadRow saying what is wrong with it."""
    row = with_our_keys(value, options)
    if (its_shape := shape_of_object(row, options)) != shape:
        raise BadRow(
            f"is {its_shape}, the rows before it are {shape}; one file, one shape: make two files of it, and"
            " name both"
        )
    weight = read_weight(row, OF_ROWS, "")
    if weight == 0:
        raise BadRow("has weight 0: there is nothing to learn from")
    weight = weight or 1.0
    if shape == "text":
        return Row(line, [], None, _text(row), weight)
    refuse_unused(row, _UNUSED, "")
    if shape == "chat" and row.get("history"):
        raise BadRow(
            "has turns and a history; put it into the turns, or ignore it: data.columns: {history: null}"
        )
    if row.get("tools") and row.get("functions"):
        raise BadRow("has tools and functions; ignore one: data.columns: {functions: null}")
    messages = read_turns(row, options) if shape == "chat" else _pair(row, *PAIRS[shape])
    if (system := row.get("system")) not in (None, ""):
        messages = [_system(system, messages[0]), *messages]
    tools = read_tools(row.get("tools") or row.get("functions"))
    check_turns(messages)
    if tools:
        check_json(tools, "the list of tools")
    messages, tools = without_nulls(messages, tools)
    return Row(line, join_calls(messages), tools, None, weight)


def _system(text: object, first: Message) -> Message:
    if not isinstance(text, str):
        raise BadRow(f"system must be text, found {show(text)}")
    if first["role"] == "system":
        raise BadRow("has a system text and a system turn; remove one")
    return Message(role="system", content=text)


def _text(row: JsonObject) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise BadRow(f"text must be text, found {show(text)}")
    if not text.strip():
        raise BadRow("text is empty; remove the row")
    check_text(text, "text", markup=False)
    return text


def _pair(row: JsonObject, question_key: str, answer_key: str) -> list[Message]:
    question, more = _text_of(row, question_key), _text_of(row, "input", may_be_null=True)
    answer = _text_of(row, answer_key)
    question = "\n".join(part for part in (question, more) if part)
    return [*_history(row.get("history")), Message(role="user", content=question), reply(answer)]


def _text_of(row: JsonObject, key: str, *, may_be_null: bool = False) -> str:
    value = row.get(key, "")
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key} must be text, found {show(value)}")
    return value


def _history(history: object) -> list[Message]:
    """Return the turns of a pair's history: [["question", "answer"], ...], perhaps as text."""
    messages = []
    history = from_json(history, "history") if history else []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise BadRow(
                f'history {number} must be ["what was asked", "what was answered"], found {show(pair)}'
            )
        messages += [Message(role="user", content=pair[0]), reply(pair[1])]
    return messages
