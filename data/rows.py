"""The meaning of a row: turns and the tools that they may call, or plain text.

row_io.py reads values, shapes.py finds their shape, turns.py reads turns, chat.py makes tokens.
"""

import hashlib
import json
from typing import NamedTuple

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import JsonObject
from qwenlora.data.marks import refuse_media
from qwenlora.data.nulls import without_nulls
from qwenlora.data.shapes import PAIRS, RowOptions, as_mapping, shape_of_object, with_our_keys
from qwenlora.data.tools import read_tools
from qwenlora.data.turns import (
    Message,
    check_json,
    check_text,
    check_turns,
    from_json,
    join_calls,
    read_turns,
    refuse_unused,
    reply,
    turns_of,
)
from qwenlora.data.weights import OF_ROWS, OF_TURNS, read_weight

# keys that would change a row's meaning but are not used -> the key to read them as, if any
_UNUSED = {
    **dict.fromkeys(("images", "videos", "audios", "image", "video", "audio", "reasoning_content"), None),
    # of turns; in a row a loss may be a measured one, and a mask a list
    **dict.fromkeys({*OF_TURNS, "loss_scale"}.difference(OF_ROWS), "weight"),
    **dict.fromkeys(("mask", "masked"), None),
}
_SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "meta_instruction")


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


def to_row(line: int, value: object, of_file: str | None, options: RowOptions) -> Row:
    """Return a row. of_file: the shape of its file's rows, if known. Raises: BadRow saying what is wrong."""
    row = with_our_keys(value, options)
    shape = shape_of_object(row, options)
    if of_file and shape != of_file:
        raise BadRow(
            f"is {shape}, the rows before it are {of_file}; one file, one shape: make two files of it, and"
            " name both"
        )
    weight = read_weight(row, OF_ROWS, "")
    if weight == 0:
        raise BadRow("has weight 0: there is nothing to learn from")
    weight = weight or 1.0
    refuse_unused(row, _UNUSED, "")
    if shape == "text":
        return Row(line, [], None, _text(row), weight)
    if shape == "chat" and row.get("history"):
        raise BadRow(
            "has turns and a history; put it into the turns, or ignore it: data.columns: {history: null}"
        )
    if row.get("tools") and row.get("functions"):
        raise BadRow("has tools and functions; ignore one: data.columns: {functions: null}")
    messages = read_turns(row, options) if shape == "chat" else _pair(row, *PAIRS[shape], options)
    messages = _with_system(row, messages)
    refuse_media(row, messages)
    tools = read_tools(row.get("tools") or row.get("functions"))
    check_turns(messages)
    if tools:
        check_json(tools, "the list of tools")
    messages, tools = without_nulls(messages, tools)
    return Row(line, join_calls(messages), tools, None, weight)


def _with_system(row: JsonObject, messages: list[Message]) -> list[Message]:
    """Return turns that begin with the row's system text, if it has one."""
    systems = {key: row[key] for key in _SYSTEMS if row.get(key) not in (None, "")}
    if not systems:
        return messages
    if len(systems) > 1:
        raise BadRow(
            f"has {' and '.join(systems)}; ignore one: data.columns: {as_mapping({list(systems)[-1]: None})}"
        )
    ((key, text),) = systems.items()
    if not isinstance(text, str):
        raise BadRow(f"{key} must be text, found {show(text)}")
    if messages[0]["role"] == "system":
        if messages[0]["content"] == text:
            return messages
        raise BadRow(
            f"has a system text and a system turn; remove one, or ignore the text: data.columns:"
            f" {as_mapping({key: None})}"
        )
    return [Message(role="system", content=text), *messages]


def _text(row: JsonObject) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise BadRow(f"text must be text, found {show(text)}")
    if not text.strip():
        raise BadRow("text is empty; remove the row")
    check_text(text, "text", markup=False)
    return text


def _pair(row: JsonObject, question_key: str, answer_key: str, options: RowOptions) -> list[Message]:
    """Return the turns of a question and its answer; either may be text, a turn, or a list of turns."""
    more = _text_of(row, "input", may_be_null=True)
    if _are_turns(row[question_key]):
        if more:
            raise BadRow(
                f"has turns in {question_key}, and input; put it into the turns, or ignore it:"
                " data.columns: {input: null}"
            )
        asked = list(map(_masked, _turns(row, question_key, options)))
    else:
        question = "\n".join(part for part in (_text_of(row, question_key), more) if part)
        asked = [Message(role="user", content=question)]
    if _are_turns(row[answer_key]):
        answered = _turns(row, answer_key, options)
    else:
        answered = [reply(_text_of(row, answer_key))]
    return [*_history(row.get("history")), *asked, *answered]


def _masked(message: Message) -> Message:
    """Return a turn of a question, in which nothing is trained, as in TRL's prompts."""
    return {**message, "weight": 0.0} if message["role"] == "assistant" else message


def _are_turns(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(t, dict) for t in value))


def _turns(row: JsonObject, key: str, options: RowOptions) -> list[Message]:
    turns = row[key]
    return turns_of([turns] if isinstance(turns, dict) else turns, key, options)


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
