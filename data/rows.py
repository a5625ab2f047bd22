"""What a row means: turns that are said, or plain text, found from its keys.

`Shape.of(value)` looks at a file's first row; `to_row(value, shape, options)` reads one. SHAPES has what people use;
data.columns and data.roles bring other names to these. A row that cannot be trained is refused in words that show what
to do. Bytes are files.py's, tokens chat.py's.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

from qwenlora.data.files import TWICE, BadRow, show

KNOWN = """known shapes of a row:
  chat               {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
                     {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  query_response     {"query": "...", "response": "..."}
  prompt_completion  {"prompt": "...", "completion": "..."}
  text               {"text": "..."}"""

# shape -> the keys of what is asked and of what is answered
PAIRS = {
    "alpaca": ("instruction", "output"),
    "query_response": ("query", "response"),
    "prompt_completion": ("prompt", "completion"),
}
TURN_LISTS = ("conversations", "messages", "conversation", "dialogue", "dialogues", "dialog")
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's own: text that holds one would forge a turn
THINK, THOUGHT = "<think>", "</think>"
WEIGHTS = ("weight", "loss", "train")  # of a turn: nothing here heeds them
# empty lines before a reply would melt into one token with the line break that ends the turn's header, a token that no
# prompt for an answer ends with
_LEADING_LINES = re.compile(r"^\s*[\r\n]")
_UNKNOWN = "unknown shape"
# what people call the two halves of a pair, and the two fields of a turn
_ASKED = ("question", "q", "ask", "input", "inputs", "prompt", "problem", "query", "instruction", "user", "human", "context")
_ANSWERED = ("answer", "a", "reply", "response", "output", "outputs", "completion", "target", "solution", "label", "assistant")
_WHO = ("speaker", "who", "name", "author", "sender", "type")
_WHAT = ("text", "message", "utterance", "body", "msg", "words", "say")
_ASSISTANTS = ("bot", "model", "ai", "chatgpt", "agent", "doctor", "assistant", "counselor", "teacher", "医生", "助手", "客服")


class Message(TypedDict):
    """One turn. role: system, user, assistant or tool."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]


class Row(NamedTuple):
    """One row. line: where it stands in its file. Either messages, and the tools they may call, or text."""

    line: int
    messages: list[Message]
    tools: list[Any] | None = None
    text: str | None = None

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal for rows that say the same, however their files write it."""
        said = json.dumps([self.messages, self.tools, self.text], ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Options(NamedTuple):
    """How the rows of a source are read. columns: their keys -> ours, None to ignore one; roles: theirs -> ours."""

    format: str = "auto"
    columns: Mapping[str, str | None] = {}  # noqa: RUF012 (never changed)
    roles: Mapping[str, str] = {}  # noqa: RUF012


def shape_of(value: Any, options: Options) -> str:
    """Return the shape of a row: chat, text or one of PAIRS. Raises: BadRow when it has none, or several."""
    return _shape(_renamed(value, options), options.format)


def _shape(row: dict[str, Any], wanted: str) -> str:
    found = ["chat"] if any(row.get(key) is not None for key in TURN_LISTS) else []
    found += [shape for shape, keys in PAIRS.items() if all(key in row for key in keys)]
    if found and wanted in ("auto", *found):
        if len(found) > 1 and wanted == "auto":
            raise BadRow(f"is {' and '.join(found)} at once; choose one: data.format: {found[0]}")
        return wanted if wanted != "auto" else found[0]
    if preferred := [key for key in ("chosen", "rejected") if key in row]:
        columns = "{chosen: completion, rejected: null}" if "prompt" in row else "{chosen: messages, rejected: null}"
        raise BadRow(
            f"preference data ({', '.join(preferred)}), which is for DPO; to learn the chosen replies alone, write"
            f" data.columns: {columns}"
        )
    if not found and "text" in row:
        if wanted in ("auto", "text"):
            return "text"
        raise BadRow(f"pre-training text where data.format={wanted} is asked for; it has no turns to learn replies from")
    if found:
        raise BadRow(f"is {' and '.join(found)}, data.format={wanted} is asked for")
    raise BadRow(f"{_UNKNOWN} with keys {', '.join(map(str, row)) or '(none)'}{_columns_hint(row)}")


def _columns_hint(row: dict[str, Any]) -> str:
    texts = [key for key, value in row.items() if isinstance(value, str)]
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        return f"; if {lists[0]} are the turns, write data.columns: {{{lists[0]}: messages}}"
    asked = next((key for key in texts if key.lower() in _ASKED), None)
    answered = next((key for key in texts if key.lower() in _ANSWERED and key != asked), None)
    if len(texts) >= 2:
        asked = asked or next(key for key in texts if key != answered)
        answered = answered or next(key for key in texts if key != asked)
        return (
            f"; if {asked} is asked and {answered} answered, write"
            f" data.columns: {{{asked}: instruction, {answered}: output}}"
        )
    return f"; if {texts[0]} is text to learn, write data.columns: {{{texts[0]}: text}}" if texts else ""


def to_row(line: int, value: Any, shape: str, options: Options) -> Row:
    """Return a row of a known shape. Raises: BadRow saying what is wrong with it."""
    row = _renamed(value, options)
    if (found := _shape(row, options.format)) != shape:
        raise BadRow(f"is {found}, the rows before it are {shape}: one file, one shape; or say data.format")
    if shape == "text":
        text = row["text"]
        if not isinstance(text, str):
            raise BadRow(f"text must be text, found {show(text)}")
        if not text.strip():
            raise BadRow("text is empty")
        _check_text(text, "text", markup=False)
        return Row(line, [], None, text)
    messages = _turns(row, options) if shape == "chat" else _pair(row, *PAIRS[shape])
    if system := row.get("system"):
        if not isinstance(system, str):
            raise BadRow(f"system must be text, found {show(system)}")
        if messages[0]["role"] == "system":
            raise BadRow("has a system text and a system turn; remove one")
        messages.insert(0, Message(role="system", content=system))
    tools = _tools(row.get("tools") or row.get("functions"))
    _check(messages)
    if tools and any(mark in json.dumps(tools, ensure_ascii=False) for mark in (TURN_START, TURN_END)):
        raise BadRow(f"tools contain {TURN_START} or {TURN_END}, which would forge a turn; remove it")
    return Row(line, messages, tools)


def _renamed(value: Any, options: Options) -> dict[str, Any]:
    """Return an object with its keys named as here."""
    if not isinstance(value, dict):
        raise BadRow(f"{_UNKNOWN}: a row must be a JSON object, found {show(value)}")
    if TWICE in value:
        raise BadRow(f"has the key {value[TWICE]} twice; keep one")
    if not options.columns:
        return value
    row = {key: item for key, item in value.items() if key not in options.columns}
    for theirs, ours in options.columns.items():
        if theirs in value and ours is not None:
            if ours in row:
                raise BadRow(f"has {theirs} and {ours}, and data.columns makes both {ours}; ignore one: {{{ours}: null}}")
            row[ours] = value[theirs]
    return row


def _turns(row: dict[str, Any], options: Options) -> list[Message]:
    lists = [key for key in TURN_LISTS if row.get(key) is not None]
    if len(lists) > 1:
        raise BadRow(f"has {' and '.join(lists)}; remove one, or ignore it: data.columns: {{{lists[1]}: null}}")
    turns = _from_json(row[lists[0]], lists[0])
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{lists[0]} must be a list of turns, found {show(turns)}")
    return [_turn(number, turn, options) for number, turn in enumerate(turns, 1)]


def _turn(number: int, value: Any, options: Options) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"turn {number} must be an object, found {show(value)}")
    try:
        turn = _renamed(value, options)
    except BadRow as error:
        raise BadRow(f"turn {number} {error}") from None
    keys = [key for key in (("from", "value"), ("role", "content")) if all(part in turn for part in key)]
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if not keys and not (calls and "role" in turn):
        raise BadRow(f"turn {number} has the keys {', '.join(turn)}; expected from and value, or role and content{_turn_hint(turn)}")
    said_by, said = keys[0] if keys else ("role", "content")
    role = turn[said_by]
    known = options.roles.get(role) or ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"turn {number} has role {show(role)}; known: {', '.join(ROLES)}{_role_hint(number, role)}")
    for key in WEIGHTS:
        if turn.get(key) is not None:
            raise BadRow(f"turn {number} has {key}, which nothing here heeds; ignore it: data.columns: {{{key}: null}}")
    content = turn.get(said)
    if known == "function_call":
        return Message(role="assistant", content="", tool_calls=_calls(number, _from_json(content, "function_call")))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"turn {number} ({role}) must be text, found {show(content)}")
    message = Message(role=known, content=_LEADING_LINES.sub("", content) if known == "assistant" else content)
    if thought := turn.get("reasoning_content"):
        if known != "assistant" or not isinstance(thought, str):
            raise BadRow(f"turn {number} ({role}): reasoning_content must be an assistant's text, found {show(thought)}")
        message["reasoning_content"] = thought
    if calls:
        if known != "assistant":
            raise BadRow(f"turn {number} ({role}) has tool_calls, which only an assistant makes")
        message["tool_calls"] = _calls(number, calls)
    return message


def _turn_hint(turn: dict[str, Any]) -> str:
    who = next((key for key in ("from", "role", *_WHO) if key in turn), None)
    what = next((key for key in ("value", "content", *_WHAT) if key in turn and key != who), None)
    renames = [f"{key}: {name}" for key, name in ((who, "role"), (what, "content")) if key and key != name]
    return f"; if so, write data.columns: {{{', '.join(renames)}}}" if who and what else ""


def _role_hint(number: int, role: Any) -> str:
    if not isinstance(role, str):
        return ""
    guess = "assistant" if role.lower() in _ASSISTANTS or number % 2 == 0 else "user"
    return f"; write data.roles: {{{role}: {guess}}}"


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as templates take them: [{"type": "function", "function": {"name", "arguments": object}}]."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f'turn {number}: a call must be {{"name": ..., "arguments": {{...}}}}, found {show(call)}')
        # as text, Qwen2.5's template would write it in quotes
        arguments = _from_json(function.get("arguments", {}), f"turn {number}: the arguments of a call")
        if not isinstance(arguments, dict):
            raise BadRow(f"turn {number}: the arguments of a call must be an object, found {show(arguments)}")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not found:
        raise BadRow(f"turn {number}: a call must name a function, found []")
    return found


def _tools(tools: Any) -> list[Any] | None:
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    tools = _from_json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools must be a list of objects, found {show(tools)}")
    return tools or None


def _from_json(value: Any, what: str) -> Any:
    """Return a value that some files hold as JSON in a text (CSV, and ShareGPT's tools)."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{what} must be JSON, found {show(value)} ({error})") from None
    return value


def _pair(row: dict[str, Any], asked: str, answered: str) -> list[Message]:
    for key in (asked, "input", answered):
        if not isinstance(row.get(key, ""), str) and not (key == "input" and row[key] is None):
            raise BadRow(f"{key} must be text, found {show(row[key])}")
    question = "\n".join(part for part in (row[asked], row.get("input")) if part)
    messages = []
    history = row.get("history") or []
    if isinstance(history, str):
        history = _from_json(history, "history")
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise BadRow(f'history {number} must be ["what was asked", "what was answered"], found {show(pair)}')
        messages += [Message(role="user", content=pair[0]), _reply(pair[1])]
    return [*messages, Message(role="user", content=question), _reply(row[answered])]


def _reply(text: str) -> Message:
    return Message(role="assistant", content=_LEADING_LINES.sub("", text))


def _check(messages: list[Message]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn: there is nothing to learn from")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"turn {number} ({message['role']}) is empty")
        if message["role"] == "system" and number > 1:
            raise BadRow(f"turn {number} is a system turn; only the first may be one")
        _check_text(message["content"], f"turn {number}")
        _check_text(message.get("reasoning_content", ""), f"turn {number}")
        if calls := message.get("tool_calls"):
            _check_text(json.dumps(calls, ensure_ascii=False), f"turn {number}")


def _check_text(text: str, what: str, *, markup: bool = True) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} contains half a character at {error.start}: {error.reason}") from None
    if "\0" in text:
        raise BadRow(f"{what} contains a NUL character at {text.index(chr(0))}; remove it")
    for mark in (TURN_START, TURN_END) if markup else ():
        if mark in text:
            raise BadRow(f"{what} contains {mark}, which would forge a turn; remove it")
