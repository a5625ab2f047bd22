"""Other forms of a turn, rewritten as role and content: lists of content parts, and objects keyed by role."""

from collections.abc import Mapping

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.chunks import JsonObject
from qwenlora.data.shapes import PAIRS
from qwenlora.data.weights import OF_TURNS

# the type of a content part -> what it holds; OpenAI's, and LLaMA-Factory's
_PARTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "content"),
    **dict.fromkeys(("reasoning", "thinking"), "reasoning_content"),
    "tool_call": "tool_calls",
}
# what a part of text may have besides; half of a turn has no weight of its own
_NOT_OF_TEXT = (
    *(*OF_TURNS, "mask"),
    *("image", "image_url", "images", "video", "video_url", "audio", "input_audio"),
)
_ORDER = ("reasoning_content", "content", "tool_calls")  # in which templates write them
_SPOKEN = ("system", "user", "assistant")  # in this order, however an object's keys are sorted
_TURN_KEYS = {"role", "content", "from", "value"}
# keys of a question and its answer in one object -> their roles
_PAIRED = {
    **{key: role for pair in PAIRS.values() for key, role in zip(pair, ("user", "assistant"), strict=True)},
    **{"question": "user", "input": "user", "answer": "assistant"},
}


def join_parts(turn: JsonObject, key: str, name: str) -> JsonObject:
    """Return a turn whose parts are joined: texts to one text, thoughts and calls under their own keys.

    key: of the parts, name: of the turn. Raises: BadRow for other parts, by their type.
    """
    parts = turn.get(key)
    if not isinstance(parts, list):
        return turn
    found: dict[str, list[object]] = {holds: [] for holds in _ORDER}
    before = _ORDER[0]
    for part in parts:
        holds, value = _part(part, name)
        if _ORDER.index(holds) < _ORDER.index(before):
            raise BadRow(
                f"{name} has a part of type {show(part['type'])} after others; a turn has thought, text and"
                " calls in this order: make turns of it"
            )
        before = holds
        found[holds].append(value)
    thoughts, texts, calls = (found[holds] for holds in _ORDER)
    joined = {**turn, key: "".join(map(str, texts))}
    for holds, value in (("reasoning_content", "".join(map(str, thoughts))), ("tool_calls", calls)):
        if value:
            if turn.get(holds):
                raise BadRow(f"{name} has {holds} twice: among its parts, and beside them; remove one")
            joined[holds] = value
    return joined


def _part(part: object, name: str) -> tuple[str, object]:
    """Return what a part holds (a key of _ORDER), and its value."""
    if isinstance(part, str):
        return "content", part
    kind = part.get("type") if isinstance(part, dict) else None
    holds = _PARTS.get(kind if isinstance(kind, str) else "text")
    if not isinstance(part, dict) or (kind is None and part.get("text") is None) or holds is None:
        what = f"of type {show(kind)}" if kind is not None else show(part)
        raise BadRow(
            f"{name} has a part {what}, and only text is read here; leave such rows out:"
            " data.on_bad_row: skip"
        )
    value = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
    if holds != "tool_calls" and not isinstance(value, str):
        raise BadRow(
            f'{name} has a part without text; expected {{"type": "text", "text": ...}}: {show(part)}'
        )
    _refuse_more(part, name)
    return holds, value


def _refuse_more(part: JsonObject, name: str) -> None:
    """Refuse a part with what would change what is learnt of it."""
    if key := next((key for key in _NOT_OF_TEXT if part.get(key) not in (None, "", [])), None):
        raise BadRow(
            f"{name} has a part with {key}, and only text is read here, of which all is trained alike; leave"
            " such rows out: data.on_bad_row: skip"
        )


def turns_by_role(turn: JsonObject, roles: Mapping[str, str]) -> list[JsonObject]:
    """Return the turns of an object keyed by role, as {"human": "...", "assistant": "..."}; else the turn.

    roles: names -> our roles. Keys that are no roles belong to the reply.
    """
    if turn.keys() & _TURN_KEYS:
        return [turn]
    filled = {key: value for key, value in turn.items() if value is not None}
    spoken = _speakers(filled, {**_PAIRED, **roles})
    turns: list[JsonObject] = [
        {"role": key if key in roles else role, "content": turn[key]} for key, role in spoken.items()
    ]
    if len(turns) < 2:
        return turns if turns and len(filled) == 1 else [turn]
    return [*turns[:-1], {**{key: value for key, value in turn.items() if key not in spoken}, **turns[-1]}]


def _speakers(filled: JsonObject, roles: Mapping[str, str]) -> dict[str, str]:
    """Return key -> role for an object that is a question and its answer, or one turn; else nothing."""
    spoken = [(roles[key], key) for key in filled if key in roles]
    spoken = [(role, key) for role, key in spoken if (role, filled[key]) != ("system", "")]
    if len(spoken) > 1:
        said = [role for role, _ in spoken]
        if not {"user", "assistant"} <= set(said) <= set(_SPOKEN) or len(said) > len(set(said)):
            return {}
        spoken.sort(key=lambda pair: _SPOKEN.index(pair[0]))
    return {key: role for role, key in spoken}
