"""What a row means: turns that are said, or plain text, found from its keys.

`shape_of(value, options)` looks at a row; `to_row(line, value, shape, options)` reads one. KNOWN has what
people use; data.columns and data.roles bring other names to these. A row that cannot be trained is refused in
words that show what to do. Bytes are files.py's, tokens chat.py's.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

from qwenlora.data.bad_row import BadRow, show, show_names
from qwenlora.data.json_rows import decode_json

KNOWN = """known shapes of a row:
  chat               {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
                     {"messages": [{"role": "user", "content": "..."},
                                   {"role": "assistant", "content": "..."}]}
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
# what data.columns may make of a file's keys: those of a row, then those of a turn
KEYS = (
    *(key for pair in PAIRS.values() for key in pair),
    *("input", "history", "system", "tools", "functions", "text"),
    *TURN_LISTS,
    *("from", "value", "role", "content", "reasoning_content", "tool_calls", "function_call"),
)
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
_TURN_KEYS = (("from", "value"), ("role", "content"))
THINK, THOUGHT = "<think>", "</think>"
# keys that would change what a turn or a row means, and that nothing here heeds: what to do instead
_UNHEEDED_IN_TURNS = {
    **dict.fromkeys(("weight", "loss", "loss_weight", "train", "training", "mask"), None),
    **dict.fromkeys(("thinking", "reasoning"), "reasoning_content"),
}
_UNHEEDED_IN_ROWS = {
    **dict.fromkeys(("weight", "loss_weight", "images", "videos", "audios", "reasoning_content"), None),
    "system_prompt": "system",
}
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
# empty lines before a reply would melt into one token with the line break that ends the turn's header, a
# token that no prompt for an answer ends with
_LEADING_LINES = re.compile(r"^\s*[\r\n]")
_UNKNOWN = "unknown shape"
_PLAIN, _NOT_TEXT = (
    re.compile(r"[^\W\d][\w-]*"),
    ("null", "true", "false", "yes", "no", "on", "off", "y", "n"),
)
MAX_DEPTH = (
    100  # of tools and arguments: what is deeper is no call, and would end in a RecursionError somewhere
)
# what people call the two halves of a pair, and the two fields of a turn
_ASKED = ("question", "q", "ask", "input", "prompt", "problem", "query", "instruction", "user", "human")
_ANSWERED = (
    "answer",
    "a",
    "reply",
    "response",
    "output",
    "completion",
    "target",
    "solution",
    "label",
    "assistant",
)
_WHO = ("speaker", "who", "name", "author", "sender", "type")
_WHAT = ("text", "message", "utterance", "body", "msg", "words", "say")
_KNOWN_ROLES = {
    "assistant": (
        "bot",
        "model",
        "ai",
        "chatgpt",
        "agent",
        "doctor",
        "counselor",
        "teacher",
        "医生",
        "助手",
        "客服",
    ),
    "user": ("patient", "customer", "client", "student", "prompter", "患者", "病人", "用户"),
    "system": ("developer", "sys", "instruction", "系统"),
    "tool": ("function", "function_response", "tool_response", "tool_result", "ipython", "environment"),
    "function_call": ("tool_call", "action"),
}


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
    """How the rows of a source are read. columns: their keys -> ours, None to ignore one; roles: theirs ->
    ours."""

    format: str = "auto"
    columns: Mapping[str, str | None] = {}
    roles: Mapping[str, str] = {}


def shape_of(value: Any, options: Options) -> str:
    """Return the shape of a row: chat, text or one of PAIRS. Raises: BadRow when it has none, or several."""
    return _shape(_renamed(value, options), options)


def _shape(row: dict[str, Any], options: Options) -> str:
    wanted = options.format
    there = {
        key for key, value in row.items() if value is not None and value != ""
    }  # a table's empty cells are not
    if "chosen" in there and "rejected" in there:
        raise BadRow(f"is preference data (chosen and rejected), which is for DPO{_preference_hint(row)}")
    if rejected := next((key for key in _REJECTED if key in there), None):
        raise BadRow(
            f"is preference data ({rejected}), which is for DPO; to learn the other replies, write"
            f" data.columns: {{{rejected}: null}}"
        )
    found = ["chat"] if there.intersection(TURN_LISTS) else []
    found += [
        shape for shape, keys in PAIRS.items() if all(key in row for key in keys) and there.intersection(keys)
    ]
    found += ["text"] if "text" in there and (wanted == "text" or not found) else []
    if not found:  # the keys without the values: their types will be refused
        found = [shape for shape, keys in PAIRS.items() if all(key in row for key in keys)]
        found += [
            shape
            for shape, keys in (("chat", TURN_LISTS), ("text", ("text",)))
            if any(key in row for key in keys)
        ]
        found = found[:1]
    if not found:
        raise BadRow(f"{_UNKNOWN} with keys {show_names(row)}{_columns_hint(row, options.columns)}")
    if wanted == "auto" and len(found) > 1:
        raise BadRow(f"is {' and '.join(found)} at once; choose one: data.format: {found[0]}")
    if wanted not in ("auto", *found):
        if found == ["text"]:
            raise BadRow(
                f"is pre-training text, data.format={wanted} is asked for; it has no turns to learn replies"
                " from: name chat rows, or write data.format: text"
            )
        raise BadRow(
            f"is {' and '.join(found)}, data.format={wanted} is asked for; leave data.format out, or name"
            " other rows"
        )
    for key in ("label", "kto_tag"):
        label = row.get(key)
        is_bool = isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false"))
        if is_bool and found != ["text"]:
            raise BadRow(
                f"is KTO data ({key}: {show(label)}), in which some replies are bad ones; keep the rows with"
                f" {key}: true, and write data.columns: {{{key}: null}}"
            )
    return wanted if wanted != "auto" else found[0]


def _preference_hint(row: dict[str, Any]) -> str:
    if isinstance(row["chosen"], dict):
        return "; to learn the chosen replies alone, write each as the last of its turns"
    if any(key in row for key in TURN_LISTS):
        return "; to learn the turns alone, write data.columns: {chosen: null, rejected: null}"
    role = "messages" if isinstance(row["chosen"], list) else None
    role = role or next(
        (answered for asked, answered in PAIRS.values() if asked in row and answered not in row), None
    )
    if not role:
        return ", and is not read here"
    return f"; to learn the chosen replies alone, write data.columns: {{chosen: {role}, rejected: null}}"


def _columns_hint(row: dict[str, Any], already: Mapping[str, str | None]) -> str:
    if any(len(key) > 40 or key.endswith(tuple("?？.。!！")) for key in map(str, row)):
        return "; if these are a row: the first line of a table names its columns, as instruction,output"
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if any(
                name in value[0]
                for name in (*TURN_LISTS, *(name for pair in PAIRS.values() for name in pair))
            ):
                return (
                    f"; if {_printed(key)} are the rows, write them alone: jq -c '.{_printed(key)}[]' old >"
                    " new"
                )
            return (
                f"; if {_printed(key)} are the turns, write data.columns:"
                f" {_mapping({**already, key: 'messages'})}"
            )
    texts = [key for key, value in row.items() if isinstance(value, str)]
    asked = next((key for key in texts if key.lower() in _ASKED), None)
    answered = next((key for key in texts if key.lower() in _ANSWERED and key != asked), None)
    if len(texts) < 2:
        for one, other in (*PAIRS.values(), *((b, a) for a, b in PAIRS.values())):
            if one in row:
                return f": {one} without {other}"
        if not texts:
            return ""
        columns = _mapping({**already, texts[0]: "text"})
        return f"; if {_printed(texts[0])} is text to learn, write data.columns: {columns}"
    asked = asked or next(key for key in texts if key != answered)
    answered = answered or next(key for key in texts if key != asked)
    ours = next((pair for pair in PAIRS.values() if asked == pair[0] or answered == pair[1]), PAIRS["alpaca"])
    return (
        f"; if {_printed(asked)} is asked and {_printed(answered)} answered, write data.columns:"
        f" {_mapping({**already, **dict(zip((asked, answered), ours, strict=True))})}"
    )


def _mapping(names: Mapping[str, str | None]) -> str:
    """Return names as they are written into a config."""
    pairs = (f"{_printed(key)}: {name or 'null'}" for key, name in names.items() if key != name)
    return "{" + ", ".join(pairs) + "}"


def _printed(key: Any) -> str:
    """Return a key as YAML takes it."""
    plain = isinstance(key, str) and len(key) <= 60 and _PLAIN.fullmatch(key) and key.lower() not in _NOT_TEXT
    return key if plain else show(key)


def to_row(line: int, value: Any, shape: str, options: Options) -> Row:
    """Return a row of a known shape. Raises: BadRow saying what is wrong with it."""
    row = _renamed(value, options)
    if (found := _shape(row, options)) != shape:
        raise BadRow(
            f"is {found}, the rows before it are {shape}; one file, one shape: make two files of it, and name"
            " both"
        )
    if shape == "text":
        text = row["text"]
        if not isinstance(text, str):
            raise BadRow(f"text must be text, found {show(text)}")
        if not text.strip():
            raise BadRow("text is empty; remove the row")
        _check_text(text, "text", markup=False)
        return Row(line, [], None, text)
    _check_heeded(row, _UNHEEDED_IN_ROWS, "")
    if shape == "chat" and row.get("history"):
        raise BadRow(
            "has turns and a history; put it into the turns, or ignore it: data.columns: {history: null}"
        )
    if row.get("tools") and row.get("functions"):
        raise BadRow("has tools and functions; ignore one: data.columns: {functions: null}")
    messages = _turns(row, options) if shape == "chat" else _pair(row, *PAIRS[shape])
    if (system := row.get("system")) not in (None, ""):
        if not isinstance(system, str):
            raise BadRow(f"system must be text, found {show(system)}")
        if messages[0]["role"] == "system":
            raise BadRow("has a system text and a system turn; remove one")
        messages.insert(0, Message(role="system", content=system))
    tools = _tools(row.get("tools") or row.get("functions"))
    _check(messages)
    if tools:
        _check_json(tools, "the list of tools")
    return Row(line, messages, tools)


def _renamed(value: Any, options: Options) -> dict[str, Any]:
    """Return an object with its keys named as here."""
    if not isinstance(value, dict):
        raise BadRow(f"{_UNKNOWN}: a row must be a JSON object, found {show(value)}")
    if not options.columns:
        return value
    row = {key: item for key, item in value.items() if key not in options.columns}
    for theirs, ours in options.columns.items():
        if theirs in value and ours is not None:
            if row.get(ours) is not None and value[theirs] is not None:
                other = next(
                    (key for key in value if key != theirs and options.columns.get(key, key) == ours), ours
                )
                raise BadRow(
                    f"has {_printed(theirs)} and {_printed(other)}, and data.columns makes {ours} of both;"
                    f" ignore one: {_mapping({other: None})}"
                )
            if row.get(ours) is None:
                row[ours] = value[theirs]
    return row


def _turns(row: dict[str, Any], options: Options) -> list[Message]:
    lists = [key for key in TURN_LISTS if row.get(key) not in (None, "")]
    if len(lists) > 1:
        raise BadRow(f"has {' and '.join(lists)}; ignore one: data.columns: {{{lists[1]}: null}}")
    key = lists[0] if lists else next(key for key in TURN_LISTS if key in row)
    turns = _from_json(row[key], key)
    if not isinstance(turns, list):
        raise BadRow(f"{key} must be a list of turns, found {show(turns)}")
    if not turns:
        raise BadRow(f"{key} is a list without turns; remove the row")
    return [_turn(number, turn, options) for number, turn in enumerate(turns, 1)]


def _turn(number: int, value: Any, options: Options) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"turn {number} must be an object, found {show(value)}")
    try:
        turn = _renamed(value, options)
    except BadRow as error:
        raise BadRow(f"turn {number} {error}") from None
    pairs = [pair for pair in _TURN_KEYS if pair[0] in turn and pair[1] in turn]
    if len(pairs) > 1:  # Parquet's turns have all keys that any turn has
        pairs = [pair for pair in pairs if any(turn[key] is not None for key in pair)] or pairs[:1]
        if len(pairs) > 1:
            raise BadRow(
                f"turn {number} has from and value, and role and content; ignore one pair: data.columns:"
                " {from: null, value: null}"
            )
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if not pairs and not (calls and "role" in turn):
        raise BadRow(
            f"turn {number} has the keys {show_names(turn)}; expected from and value, or role and"
            f" content{_turn_hint(turn)}"
        )
    said_by, said = pairs[0] if pairs else ("role", "content")
    role = turn[said_by]
    known = options.roles.get(role) or ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRow(
            f"turn {number} has role {show(role)}; known:"
            f" {', '.join(ROLES)}{_role_hint(number, role, options)}"
        )
    name = f"turn {number} ({role})"
    _check_heeded(turn, _UNHEEDED_IN_TURNS, f"turn {number} ")
    if turn.get("tool_calls") and turn.get("function_call"):
        raise BadRow(
            f"{name} has tool_calls and function_call; ignore one: data.columns: {{function_call: null}}"
        )
    content = turn.get(said)
    if known == "function_call":
        return Message(role="assistant", content="", tool_calls=_calls(name, content))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        parts = "; write the text itself, parts are not read" if isinstance(content, list) else ""
        raise BadRow(f"{name} must be text, found {show(content)}{parts}")
    message = Message(
        role=known, content=_LEADING_LINES.sub("", content) if known == "assistant" else content
    )
    if thought := turn.get("reasoning_content"):
        if known != "assistant" or not isinstance(thought, str):
            raise BadRow(f"{name}: reasoning_content must be an assistant's text, found {show(thought)}")
        message["reasoning_content"] = thought
    if calls:
        if known != "assistant":
            raise BadRow(f"{name} has tool_calls, which only an assistant makes")
        message["tool_calls"] = _calls(name, calls)
    return message


def _check_heeded(found: dict[str, Any], unheeded: Mapping[str, str | None], what: str) -> None:
    for key, instead in unheeded.items():
        if found.get(key) not in (None, "", []):
            also = f" read it as {instead}: data.columns: {_mapping({key: instead})}, or" if instead else ""
            raise BadRow(
                f"{what}has {key}, which nothing here heeds;{also} ignore it: data.columns: {{{key}: null}}"
            )


def _turn_hint(turn: dict[str, Any]) -> str:
    who = next((key for key in ("from", "role", *_WHO) if key in turn), None)
    what = next((key for key in ("value", "content", *_WHAT) if key in turn and key != who), None)
    if who and what:
        return (
            f"; if {who} speaks and {what} is said, write data.columns:"
            f" {_mapping({who: 'role', what: 'content'})}"
        )
    if any(key in ROLES for key in turn):
        return ', one turn each: {"role": "user", "content": "..."}'
    return ""


def _role_hint(number: int, role: Any, options: Options) -> str:
    if not isinstance(role, str) or not role:
        return ""
    said = role.lower()
    guess = ROLES.get(said) or next((ours for ours, theirs in _KNOWN_ROLES.items() if said in theirs), None)
    guess = guess or ("user" if number % 2 else "assistant")
    return f"; write data.roles: {_mapping({**options.roles, role: guess})}"


def _calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as templates take them: [{"type": "function", "function": {"name", "arguments":
    object}}]."""
    found = []
    calls = _from_json(calls, f"{name}: a call")
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"].strip()
        ):
            raise BadRow(f'{name}: a call must be {{"name": ..., "arguments": {{...}}}}, found {show(call)}')
        if "arguments" not in function and (others := set(function) - {"name", "id", "type", "index"}):
            raise BadRow(
                f"{name}: a call has no arguments, but {', '.join(sorted(map(str, others)))}; call it"
                " arguments"
            )
        # as text, Qwen2.5's template would write it in quotes
        arguments = _from_json(function.get("arguments", {}), f"{name}: the arguments of a call")
        if not isinstance(arguments, dict):
            raise BadRow(f"{name}: the arguments of a call must be an object, found {show(arguments)}")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not found:
        raise BadRow(f"{name}: a call must name a function, found []")
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
            return decode_json(value)
        except BadRow as error:
            raise BadRow(f"{what} must be JSON, found {show(value)}, {error}") from None
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
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(said, str) for said in pair)
        ):
            raise BadRow(
                f'history {number} must be ["what was asked", "what was answered"], found {show(pair)}'
            )
        messages += [Message(role="user", content=pair[0]), _reply(pair[1])]
    return [*messages, Message(role="user", content=question), _reply(row[answered])]


def _reply(text: str) -> Message:
    return Message(role="assistant", content=_LEADING_LINES.sub("", text))


def _check(messages: list[Message]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn: there is nothing to learn from")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"turn {number} ({message['role']}) is empty; write what is said, or remove it")
        if message["role"] == "system" and number > 1:
            raise BadRow(
                f"turn {number} is a system turn; only the first may be one: remove it, or make it a user's"
            )
        _check_text(message["content"], f"turn {number}")
        _check_text(message.get("reasoning_content", ""), f"turn {number}")
        if calls := message.get("tool_calls"):
            _check_json(calls, f"turn {number}")


def _check_json(value: list[Any], what: str) -> None:
    """Refuse tools and calls that a template cannot write as JSON."""
    if _deeper(value, MAX_DEPTH):
        raise BadRow(f"{what} has JSON nested more than {MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:  # Parquet's dates, bytes, maps
        raise BadRow(f"{what}: {error}; write it as text") from None
    except ValueError:
        raise BadRow(f"{what} has NaN or Infinity, which is no JSON; write null, or text") from None
    _check_text(text, what)


def _deeper(value: Any, limit: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not limit or any(_deeper(part, limit - 1) for part in parts)


def _check_text(text: str, what: str, *, markup: bool = True) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{what} contains half a character ({show(text[error.start])}) at {error.start}, the other half"
            " is missing; mend it, or remove the row"
        ) from None
    if "\0" in text:
        raise BadRow(f"{what} contains a NUL character at {text.index(chr(0))}; remove it")
    for mark in (TURN_START, TURN_END) if markup else ():
        if mark in text:
            raise BadRow(f"{what} contains {mark}, which would forge a turn; remove it")
