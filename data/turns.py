"""The turns of a chat row (speaker, text, function calls), and checks that templates can write them."""

import json
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any, NotRequired, TypedDict

from qwenlora.data.bad_row import BadRow, show, show_names
from qwenlora.data.chunks import JsonObject
from qwenlora.data.forms import join_parts, turns_by_role
from qwenlora.data.json_rows import decode_json
from qwenlora.data.shapes import (
    ANSWERS,
    QUESTIONS,
    TURN_LISTS,
    RowOptions,
    as_mapping,
    hint_if,
    named,
    with_our_keys,
)
from qwenlora.data.weights import OF_TURNS, read_weight

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "developer": "system",  # OpenAI's newer name; Qwen's templates know system alone, or treat both alike
}
END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's marks: text that has one would forge a turn
THINK, THOUGHT = "<think>", "</think>"
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")
# JSON of tools and arguments may nest this deep; deeper JSON is no call, and would end in a RecursionError
MAX_DEPTH = 100
_TURN_KEYS = (("from", "value"), ("role", "content"))
# keys that would change a turn's meaning but are not used -> the key to read them as, if any
_UNUSED = {
    # some mask what is trained, and some what is not
    **dict.fromkeys(("mask", "masked", "train_detail", "training_detail"), None),
    "loss_scale": "weight",
    **dict.fromkeys(("thinking", "reasoning"), "reasoning_content"),
}
# line breaks before a reply would melt with the header's into one token, which ends no generation prompt
_LEADING_LINES = re.compile(r"^\s*[\r\n]")
# names that people use for the two fields of a turn, and for the roles
_SPEAKERS = ("speaker", "who", "name", "author", "sender", "type")
_TEXTS = ("text", "message", "utterance", "body", "msg", "words", "say")
_ASSISTANTS = (
    *("bot", "model", "ai", "chatgpt", "agent", "doctor", "counselor", "teacher"),
    *("医生", "助手", "客服"),
)
_OTHER_ROLES = {
    "assistant": _ASSISTANTS,
    "user": ("patient", "customer", "client", "student", "prompter", "患者", "病人", "用户"),
    "system": ("sys", "instruction", "系统"),
    "tool": ("function", "function_response", "tool_response", "tool_result", "ipython", "environment"),
    "function_call": ("tool_call", "action"),
}


class Function(TypedDict):
    """A call of a function."""

    name: str
    arguments: JsonObject


class ToolCall(TypedDict):
    """A call as chat templates take it."""

    type: str
    function: Function


class Message(TypedDict):
    """One turn. role: system, user, assistant or tool; weight: of its loss (weights.py), by default 1."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    weight: NotRequired[float]


def reply(text: str) -> Message:
    """Return an assistant's turn."""
    return Message(role="assistant", content=_LEADING_LINES.sub("", text))


def without_empty_thought(text: str) -> str:
    """Return a reply without the empty thought that it begins with, if it does."""
    empty = _EMPTY_THOUGHT.match(text)
    return _LEADING_LINES.sub("", text[empty.end() :]) if empty else text


def is_masked(message: Message) -> bool:
    """Return whether a turn is a reply that is not trained, since its weight is 0."""
    return message["role"] == "assistant" and message.get("weight") == 0


def is_learnt(message: Message) -> bool:
    """Return whether a turn is a reply that is trained."""
    return message["role"] == "assistant" and not is_masked(message)


def read_turns(row: JsonObject, options: RowOptions) -> list[Message]:
    """Return the turns of a chat row. Raises: BadRow."""
    lists = [key for key in TURN_LISTS if row.get(key) not in (None, "")]
    if len(lists) > 1:
        raise BadRow(f"has {' and '.join(lists)}; ignore one: data.columns: {{{lists[1]}: null}}")
    key = lists[0] if lists else next(key for key in TURN_LISTS if key in row)
    return turns_of(from_json(row[key], key), key, options)


def turns_of(turns: object, key: str, options: RowOptions) -> list[Message]:
    """Return the turns of a list. key: of the row, for messages. Raises: BadRow."""
    if not isinstance(turns, list):
        raise BadRow(f"{key} must be a list of turns, found {show(turns)}")
    if not turns:
        raise BadRow(f"{key} is a list without turns; remove the row")
    roles = {**ROLES, **options.roles}
    named = (_turn_with_our_keys(number, turn, options) for number, turn in enumerate(turns, 1))
    spoken = list(chain.from_iterable(turns_by_role(turn, roles) for turn in named))
    _refuse_unknown_roles(spoken, options)
    return [_turn(number, turn, options) for number, turn in enumerate(spoken, 1)]


def join_calls(messages: list[Message]) -> list[Message]:
    """Return turns with calls that stand alone joined to the assistant's turn before them: it ends once,
    after all of its calls. Raises: BadRow when they have another weight than it."""
    joined: list[Message] = []
    for number, message in enumerate(messages, 1):
        calls, before = message.get("tool_calls", []), joined[-1] if joined else None
        if calls and not message["content"].strip():
            message = {**message, "content": ""}  # white space would stand before the call
            if before and before["role"] == "assistant" and "reasoning_content" not in message:
                if before.get("weight") != message.get("weight"):
                    raise BadRow(
                        f"turn {number} and the one before it are one turn of the assistant, and have"
                        " different weights; give them the same"
                    )
                joined[-1] = {**before, "tool_calls": [*before.get("tool_calls", []), *calls]}
                continue
        joined.append(message)
    return joined


def _turn(number: int, turn: JsonObject, options: RowOptions) -> Message:
    message = _unweighted(number, turn, options)
    weight = read_weight(turn, OF_TURNS, f"turn {number} ")
    if weight and message["role"] != "assistant":
        raise BadRow(
            f"turn {number} ({message['role']}) has weight {weight:g}, and only replies are trained; give it"
            " weight 0, or none"
        )
    if weight is not None and weight != 1:
        message["weight"] = weight
    return message


def _unweighted(number: int, turn: JsonObject, options: RowOptions) -> Message:
    speaker, text = _keys_of(number, turn)
    role = _role(number, turn[speaker], options)
    name = f"turn {number} ({turn[speaker]})"
    if role != "function_call":
        turn = join_parts(turn, text, name)
    called = turn.get("function_call")
    calls = turn.get("tool_calls") or ([called] if called else None)
    refuse_unused(turn, _UNUSED, f"turn {number} ")
    if turn.get("tool_calls") and called:
        raise BadRow(
            f"{name} has tool_calls and function_call; ignore one: data.columns: {{function_call: null}}"
        )
    content = turn.get(text)
    if role == "function_call":
        return Message(role="assistant", content="", tool_calls=_calls(name, content))
    message = _message(name, role, "" if content is None and calls else content)
    if thought := _thought(name, role, turn.get("reasoning_content") or ""):
        message["reasoning_content"] = thought
    if calls:
        if role != "assistant":
            raise BadRow(f"{name} has tool_calls, which only an assistant makes")
        message["tool_calls"] = _calls(name, calls)
    return message


def _turn_with_our_keys(number: int, value: object, options: RowOptions) -> JsonObject:
    if not isinstance(value, dict):
        raise BadRow(f"turn {number} must be an object, found {show(value)}")
    try:
        return with_our_keys(value, options)
    except BadRow as error:
        raise BadRow(f"turn {number} {error}") from None


def _thought(name: str, role: str, thought: object) -> str:
    if not isinstance(thought, str) or (role != "assistant" and thought.strip()):
        raise BadRow(f"{name}: reasoning_content must be an assistant's text, found {show(thought)}")
    return thought if thought.strip() else ""


def _message(name: str, role: str, content: object) -> Message:
    if not isinstance(content, str):
        raise BadRow(f"{name} must be text, found {show(content)}")
    return reply(content) if role == "assistant" else Message(role=role, content=content)


def _keys_of(number: int, turn: JsonObject) -> tuple[str, str]:
    """Return the keys of a turn's speaker and text."""
    pairs = [pair for pair in _TURN_KEYS if turn.keys() >= set(pair)]
    if len(pairs) > 1:  # Parquet's turns have all keys that any turn has
        pairs = [pair for pair in pairs if (turn[pair[0]], turn[pair[1]]) != (None, None)] or pairs[:1]
        if len(pairs) > 1:
            raise BadRow(
                f"turn {number} has from and value, and role and content; ignore one pair: data.columns:"
                " {from: null, value: null}"
            )
    if pairs:
        return pairs[0]
    if "role" in turn and (turn.get("tool_calls") or turn.get("function_call")):
        return "role", "content"
    reason = f"turn {number} has the keys {show_names(turn)}; expected from and value, or role and content"
    raise _with_hint(reason, turn)


def _role(number: int, role: object, options: RowOptions) -> str:
    """Return our name for a role."""
    ours = options.roles.get(role) or ROLES.get(role) if isinstance(role, str) else None
    if ours is None:
        raise BadRow(f"turn {number} has role {show(role)}; known: {', '.join(ROLES)}")
    return ours


def _refuse_unknown_roles(turns: list[JsonObject], options: RowOptions) -> None:
    """Refuse roles without a meaning, all of them at once."""
    unknown: dict[str, int] = {}  # role -> the first turn that has it
    for number, turn in enumerate(turns, 1):
        role = turn.get("from" if "value" in turn and turn.get("from") is not None else "role")
        if isinstance(role, str) and role and role not in options.roles and role not in ROLES:
            unknown.setdefault(role, number)
    if not unknown:
        return
    first, number = next(iter(unknown.items()))
    reason = f"turn {number} has role {show(first)}; known: {', '.join(ROLES)}"
    if first.lower() == "pretrain":
        raise BadRow(f'{reason}; text to learn as a whole is written {{"text": "..."}}')
    roles = {**options.roles, **{role: _meaning(turn, role) for role, turn in unknown.items()}}
    raise BadRow(f"{reason}; write data.roles: {as_mapping(roles)}", roles)


def _meaning(number: int, role: str) -> str:
    """Return what a role may mean. number: of its turn."""
    name = role.lower()
    guess = ROLES.get(name) or next((ours for ours, theirs in _OTHER_ROLES.items() if name in theirs), None)
    return guess or ("user" if number % 2 else "assistant")


def refuse_unused(values: JsonObject, unused: Mapping[str, str | None], where: str) -> None:
    """Refuse keys that would change what is learnt. unused: key -> the key to read it as, if any."""
    found = [key for key in unused if values.get(key) not in (None, "", [])]
    if not found:
        return
    instead = {key: ours for key in found if (ours := unused[key])}
    it = "it" if len(found) == 1 else " and ".join(instead)
    also = f" read {it} as {' and '.join(instead.values())}: data.columns: {as_mapping(instead)}, or"
    raise BadRow(
        f"{where}has {' and '.join(found)}, which qwenlora does not use;{also if instead else ''} ignore"
        f" {'it' if len(found) == 1 else 'them'}: data.columns: {as_mapping(dict.fromkeys(found))}"
    )


def _with_hint(reason: str, turn: JsonObject) -> BadRow:
    """Return the error for a turn whose keys have no meaning, with what they may mean."""
    speaker = next((key for key in ("from", "role", *_SPEAKERS) if key in turn), None)
    text = next((key for key in ("value", "content", *_TEXTS) if key in turn and key != speaker), None)
    if speaker and text:
        hint = hint_if(f"{speaker} speaks and {text} is said", {speaker: "role", text: "content"})
        return BadRow(f"{reason}{hint.text}", columns=hint.columns)
    user, assistant = named(turn, QUESTIONS), named(turn, ANSWERS)
    if user and assistant:
        systems = {key: "system" for key in turn if "system" in key.lower()}
        roles = {**systems, user: "user", assistant: "assistant"}
        return BadRow(
            f"{reason}; if {user} is said by the user, write data.roles: {as_mapping(roles)}", roles
        )
    if any(key in ROLES for key in turn):
        return BadRow(f'{reason}, one turn each: {{"role": "user", "content": "..."}}')
    return BadRow(reason)


# ---- functions


def _calls(name: str, value: object) -> list[ToolCall]:
    """Return calls as templates take them. name: of the turn; value: one call or a list, perhaps as text."""
    value = from_json(value, f"{name}: a call")
    calls = [_call(name, call) for call in (value if isinstance(value, list) else [value])]
    if not calls:
        raise BadRow(f"{name}: a call must name a function, found []")
    return calls


def _call(name: str, call: object) -> ToolCall:
    call = without_null_keys(from_json(call, f"{name}: a call"))
    function = without_null_keys(call.get("function", call)) if isinstance(call, dict) else None
    called = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(called, str) or not called.strip():
        raise BadRow(f'{name}: a call must be {{"name": ..., "arguments": {{...}}}}, found {show(call)}')
    if "arguments" not in function and (others := set(function) - {"name", "id", "type", "index"}):
        raise BadRow(
            f"{name}: a call has no arguments, but {', '.join(sorted(map(str, others)))}; call it arguments"
        )
    # as text, Qwen2.5's template would write it in quotes
    arguments = from_json(function.get("arguments", {}), f"{name}: the arguments of a call")
    if not isinstance(arguments, dict):
        raise BadRow(f"{name}: the arguments of a call must be an object, found {show(arguments)}")
    return ToolCall(type="function", function=Function(name=called, arguments=arguments))


def without_null_keys(value: Any) -> Any:
    """Return an object without the keys whose value is null, which Arrow gives each row; else the value."""
    return (
        {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
    )


def from_json(value: object, what: str) -> object:
    """Return a value, decoded where it is JSON in a text (in CSV, and ShareGPT's tools), even twice."""
    while isinstance(value, str):
        text = value
        try:
            value = decode_json(text)
        except BadRow as error:
            if text.lstrip()[:1] in ("[", "{"):
                raise BadRow(f"{what} must be JSON, found {show(text)}, {error}") from None
            raise BadRow(f"{what} must be a list or an object, found the text {show(text)}") from None
    return value


# ---- checks that templates can write the turns


def check_turns(messages: list[Message]) -> None:
    """Refuse turns that cannot be trained. Raises: BadRow."""
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        raise BadRow("no assistant turn: there is nothing to learn from")
    if not any(map(is_learnt, replies)):
        raise BadRow("each reply has weight 0: there is nothing to learn from")
    for number, message in enumerate(messages, 1):
        if not without_empty_thought(message["content"]).strip() and not message.get("tool_calls"):
            raise BadRow(f"turn {number} ({message['role']}) is empty; write what is said, or remove it")
        if message["role"] == "system" and number > 1:
            raise BadRow(
                f"turn {number} is a system turn; only the first may be one: remove it, or make it a user's"
            )
        check_text(message["content"], f"turn {number}")
        check_text(message.get("reasoning_content", ""), f"turn {number}")
        if calls := message.get("tool_calls"):
            check_json(calls, f"turn {number}")


def check_json(value: object, what: str) -> None:
    """Refuse tools and calls that a template cannot write as JSON."""
    if _is_deeper(value, MAX_DEPTH):
        raise BadRow(f"{what} has JSON nested more than {MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:  # Parquet's dates, bytes, maps
        raise BadRow(f"{what}: {error}; write it as text") from None
    except ValueError:
        raise BadRow(f"{what} has NaN or Infinity, which is no JSON; write null, or text") from None
    check_text(text, what)


def _is_deeper(value: object, limit: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not limit or any(_is_deeper(part, limit - 1) for part in parts)


def check_text(text: str, what: str, *, markup: bool = True) -> None:
    """Refuse text that no tokenizer takes as it stands. markup: refuse ChatML's own marks, too."""
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
