"""The shape of a row, from its keys, and hints on what to write into a config when it has none.

data.columns and data.roles map other names to the shapes in KNOWN; rows.py reads rows of each shape.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import NamedTuple, NoReturn

from qwenlora.data.bad_row import BadRow, show, show_names
from qwenlora.data.chunks import JsonObject

KNOWN = """known shapes of a row:
  chat               {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
                     {"messages": [{"role": "user", "content": "..."},
                                   {"role": "assistant", "content": "..."}]}
                     {"messages": [{"human": "...", "assistant": "..."}]}
  alpaca             {"instruction": "...", "input": "...", "output": "..."}
  query_response     {"query": "...", "response": "..."}
  prompt_completion  {"prompt": "...", "completion": "..."}
  text               {"text": "..."}"""

# shape -> the keys of the question and of the answer
PAIRS = {
    "alpaca": ("instruction", "output"),
    "query_response": ("query", "response"),
    "prompt_completion": ("prompt", "completion"),
}
TURN_LISTS = ("conversations", "messages", "conversation", "dialogue", "dialogues", "dialog")
# keys that data.columns may map to: a row's, then a turn's
KEYS = (
    *(key for pair in PAIRS.values() for key in pair),
    *("input", "history", "system", "tools", "functions", "text"),
    *TURN_LISTS,
    *("from", "value", "role", "content", "reasoning_content", "tool_calls", "function_call", "weight"),
)
# keys of the two replies of preference data: chosen, response_chosen, chosen_messages ...
_PREFERENCE = (
    r"(?:(?:response|answer|output|completion)_)?{}"
    r"(?:_(?:responses?|messages|conversations?|answer|reply|text|output|completion))?"
)
_CHOSEN, _REJECTED = (re.compile(_PREFERENCE.format(name)) for name in ("chosen", "reject(?:ed)?"))
_UNKNOWN = "unknown shape"
# names that people use for the two halves of a pair, the likeliest first; a name may end with them: toy_input
QUESTIONS = (
    *("instruction", "instruct", "question", "query", "prompt", "problem", "q", "ask", "user", "human"),
    "input",
)
ANSWERS = (
    *("answer", "a", "reply", "response", "output", "completion", "chosen", "target", "solution", "label"),
    "assistant",
)
CONTEXTS = ("context", "passage", "document")  # what a question is about
ROWS = ("data", "rows", "examples")  # of a whole data set in one object
_TOOLS = ("tools", "functions")
_PLAIN_YAML = re.compile(r"[^\W\d][\w-]*")
_NOT_TEXT_IN_YAML = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


class RowOptions(NamedTuple):
    """How a source's rows are read. columns: its keys -> ours, None: ignored; roles: its roles -> ours."""

    format: str = "auto"
    columns: Mapping[str, str | None] = {}
    roles: Mapping[str, str] = {}


def shape_of(value: object, options: RowOptions) -> str:
    """Return the shape of a row: chat, text or one of PAIRS. Raises: BadRow when it has none, or several."""
    return shape_of_object(with_our_keys(value, options), options)


def shape_of_object(row: JsonObject, options: RowOptions) -> str:
    """Return the shape of a row whose keys are ours. Raises: BadRow when it has none, or several."""
    filled = {key for key, value in row.items() if value is not None and value != ""}
    _refuse_preferences(row, filled, options.columns)
    shapes = _shapes(row, filled, options.format)
    if not shapes:
        hint = _hint(row, options.columns)
        raise BadRow(f"{_UNKNOWN} with keys {show_names(row)}{hint.text}", columns=hint.columns)
    shape = _chosen(shapes, options.format)
    if shapes != ["text"]:
        _refuse_bad_replies(row)
    return shape


def _shapes(row: JsonObject, filled: set[str], wanted: str) -> list[str]:
    """Return the shapes that a row may have. filled: its keys with a value; tables have empty cells."""
    shapes = ["chat"] if filled.intersection(TURN_LISTS) else []
    shapes += [name for name, keys in PAIRS.items() if row.keys() >= set(keys) and filled.intersection(keys)]
    if "text" in filled and (wanted == "text" or not shapes):
        shapes.append("text")
    # where all values are empty, the keys decide, so that the message is about the values
    return shapes or _shapes_by_keys(row)[:1]


def _shapes_by_keys(row: JsonObject) -> list[str]:
    keys = {**PAIRS, **{name: (name,) for name in TURN_LISTS}, "text": ("text",)}
    names = [name for name, needed in keys.items() if row.keys() >= set(needed)]
    return ["chat" if name in TURN_LISTS else name for name in names]


def _chosen(shapes: list[str], wanted: str) -> str:
    names = " and ".join(shapes)
    if wanted == "auto":
        if len(shapes) > 1:
            raise BadRow(f"is {names} at once; choose one: data.format: {shapes[0]}")
        return shapes[0]
    if wanted in shapes:
        return wanted
    if shapes == ["text"]:
        raise BadRow(
            f"is pre-training text, data.format={wanted} is asked for; it has no turns to learn replies from:"
            " name chat rows, or write data.format: text"
        )
    raise BadRow(f"is {names}, data.format={wanted} is asked for; leave data.format out, or name other rows")


def _refuse_preferences(row: JsonObject, filled: set[str], columns: Mapping[str, str | None]) -> None:
    replies = [key for key in row if key in filled and isinstance(row[key], str | list | dict)]
    rejected = next(filter(_REJECTED.fullmatch, replies), None)
    if not rejected:
        return
    chosen = next(filter(_CHOSEN.fullmatch, replies), None)
    if not chosen:
        raise BadRow(
            f"is preference data ({rejected}), which is for DPO; to learn the other replies, write"
            f" data.columns: {_more_columns(columns, {rejected: None})}"
        )
    learnt, mapping = _without_preferences(row, chosen)
    cure = ", and is not read here"
    if mapping:
        line = _more_columns(columns, {**mapping, rejected: None})
        cure = f"; to learn the {learnt} alone, write data.columns: {line}"
    raise BadRow(f"is preference data ({chosen} and {rejected}), which is for DPO{cure}")


def _without_preferences(row: JsonObject, chosen: str) -> tuple[str, dict[str, str | None]]:
    """Return what can be learnt of preference data, and the columns for it; empty where nothing can."""
    reply = row[chosen]
    lists: dict[str, str | None] = {key: None for key in TURN_LISTS if row.get(key)}
    if isinstance(reply, list) and not _is_reply(reply[:1]):  # the whole conversation
        return "chosen replies", {**lists, chosen: "messages"}
    for turns in lists:
        if _is_reply(row[turns]):
            return "turns", {chosen: None}
        prompt: dict[str, str | None] = {"prompt": None} if "prompt" in row else {}
        return "chosen replies", {**prompt, turns: "prompt", chosen: "completion"}
    for question, answer in PAIRS.values():
        if question in row:
            return ("pairs", {chosen: None}) if row.get(answer) else ("chosen replies", {chosen: answer})
    if asked := named(row, QUESTIONS):
        return "chosen replies", {asked: "prompt", chosen: "completion"}
    return "", {}


def _is_reply(turns: object) -> bool:
    """Return whether the last of some turns is an assistant's."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    speaker = (last.get("role") or last.get("from")) if isinstance(last, dict) else None
    return speaker in ("assistant", "gpt", "function_call")


def _more_columns(columns: Mapping[str, str | None], more: Mapping[str, str | None]) -> str:
    """Return data.columns with more of our keys in it, as YAML. more: keys as rows have them by columns."""
    theirs = {ours: key for key, ours in columns.items() if ours}
    return as_mapping({**columns, **{theirs.get(key, key): ours for key, ours in more.items()}})


def _refuse_bad_replies(row: JsonObject) -> None:
    """Refuse rows whose label says that the reply is a bad one. Numbers in `label` may be classes."""
    for key, bad in (("label", ("false",)), ("kto_tag", ("false", "0", "0.0"))):
        label = row.get(key)
        if isinstance(label, str | float | int) and str(label).strip().lower() in bad:
            raise BadRow(
                f"has a bad reply, by its label for KTO ({key}: {show(label)}); to learn the good ones alone,"
                f" write data.on_bad_row: skip, or if it is no such label, data.columns: {{{key}: null}}"
            )


# ---- hints for rows without a shape


class Hint(NamedTuple):
    """The end of a message. columns: data.columns as they should be, where that is the cure."""

    text: str = ""
    columns: Mapping[str, str | None] = {}


def hint_if(guess: str, columns: Mapping[str, str | None]) -> Hint:
    """Return the hint that some columns are the cure. guess: what they suppose."""
    return Hint(f"; if {guess}, write data.columns: {as_mapping(columns)}", columns)


def _hint(row: JsonObject, columns: Mapping[str, str | None]) -> Hint:
    if any(map(_is_prose, map(str, row))):
        return Hint(
            "; if these are a row: the first line of a table names its columns, as instruction,output"
        )
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and key not in _TOOLS:
            return _list_hint(key, value, row, columns)
    texts = [key for key, value in row.items() if isinstance(value, str)]
    return _pair_hint(texts, columns) if len(texts) > 1 else _half_hint(row, texts, columns)


def _is_prose(key: str) -> bool:
    return len(key) > 40 or key.endswith(tuple("?？.。!！"))


def _list_hint(key: str, items: list[object], row: JsonObject, columns: Mapping[str, str | None]) -> Hint:
    """Return the hint for a row with a list of objects."""
    name, first = as_yaml(key), items[0]
    assert isinstance(first, dict), "the caller looks"
    has_rows = any(known in first for known in (*TURN_LISTS, *chain.from_iterable(PAIRS.values())))
    if has_rows or key in ROWS:
        shared = [other for other in chain.from_iterable(PAIRS.values()) if isinstance(row.get(other), str)]
        more = f"{{{', '.join(shared)}}} + " if shared else ""
        return Hint(f"; if {name} are the rows, write them alone: jq -c '{more}.{name}[]' old > new")
    if key in QUESTIONS and {"role", "content"} <= first.keys() and not _is_reply(items):
        return Hint(f": {name} without a reply; such rows are for reinforcement learning")
    return hint_if(f"{name} are the turns", {**columns, key: "messages"})


def _half_hint(row: JsonObject, texts: list[str], columns: Mapping[str, str | None]) -> Hint:
    """Return the hint for a row with one text at most."""
    for one, other in (*PAIRS.values(), *((answer, question) for question, answer in PAIRS.values())):
        if one in row:
            is_text = texts == [one] and one != "instruction"
            hint = hint_if("it is text to learn", {**columns, one: "text"}) if is_text else Hint()
            return Hint(f": {one} without {other}{hint.text}")  # no cure: more likely a half is missing
    return (
        hint_if(f"{as_yaml(texts[0])} is text to learn", {**columns, texts[0]: "text"}) if texts else Hint()
    )


def _pair_hint(texts: list[str], columns: Mapping[str, str | None]) -> Hint:
    """Return the hint for a row with two texts or more."""
    beside = _beside(texts)
    pair = [key for key in texts if key not in beside]
    question = named(pair, QUESTIONS)
    answer = named((key for key in pair if key != question), ANSWERS)
    others = [key for key in pair if key not in (question, answer)]
    question = question or others.pop(0)
    answer = answer or others.pop(0)
    pairs = (pair for pair in PAIRS.values() if question == pair[0] or answer == pair[1])
    ours = next(pairs, PAIRS["alpaca"])
    return hint_if(
        f"{as_yaml(question)} is asked and {as_yaml(answer)} answered",
        {**columns, **beside, question: ours[0], answer: ours[1]},
    )


def _beside(keys: list[str]) -> dict[str, str]:
    """Return which keys may be the system turn, and what the question is about; two keys are left out."""
    ours = {key: "system" for key in keys if "system" in key.lower()}
    about = named(keys, CONTEXTS)
    found = {about: "input", **ours} if about else ours
    return dict(islice(found.items(), len(keys) - 2))


def named(keys: Iterable[str], names: tuple[str, ...]) -> str | None:
    """Return the key that is, or ends with, the first of some names that any key has."""
    words = {key: re.split(r"[\W_]", key.lower())[-1] for key in keys}
    return next((key for name in names for key, word in words.items() if word == name), None)


# ---- keys


def with_our_keys(value: object, options: RowOptions) -> JsonObject:
    """Return an object with data.columns' keys; a list of objects is its messages.
    Raises: BadRow for no object, or when two keys become one."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise BadRow(f"{_UNKNOWN}: a row must be a JSON object, found {show(value)}")
    columns = options.columns
    if not columns:
        return value
    row = {key: item for key, item in value.items() if key not in columns}
    for theirs, ours in columns.items():
        if theirs not in value or ours is None:
            continue
        if row.get(ours) is None:
            row[ours] = value[theirs]
        elif value[theirs] is not None:
            _refuse_both(theirs, ours, value, columns)
    return row


def _refuse_both(theirs: str, ours: str, value: JsonObject, columns: Mapping[str, str | None]) -> NoReturn:
    other = next((key for key in value if key != theirs and columns.get(key, key) == ours), ours)
    raise BadRow(
        f"has {as_yaml(theirs)} and {as_yaml(other)}, and data.columns makes {ours} of both; ignore one:"
        f" {as_mapping({other: None})}"
    )


def as_mapping(names: Mapping[str, str | None]) -> str:
    """Return a mapping as YAML for a config; names that do not change are left out."""
    pairs = (f"{as_yaml(key)}: {name or 'null'}" for key, name in names.items() if key != name)
    return "{" + ", ".join(pairs) + "}"


def as_yaml(key: object) -> str:
    """Return a key as it is written into a config: in quotes where YAML needs them."""
    if (
        isinstance(key, str)
        and len(key) <= 60
        and _PLAIN_YAML.fullmatch(key)
        and key.lower() not in _NOT_TEXT_IN_YAML
    ):
        return key
    return show(key)
