"""What a chat template made of a reply: what of it the prompt has already, and whether the rest is the row's.

Templates write calls as JSON ({"name": ..., "arguments": ...}, Qwen2.5's and Qwen3's) or as XML
(<function=...> with <parameter=...>, Qwen3-Coder's and Qwen3.5's), and leave out or move thoughts.
"""

import json
import re

from qwenlora.data.bad_row import BadRow, show
from qwenlora.data.turns import THINK, THOUGHT, Message, ToolCall

# What generation prompts of templates end with, after the turn's header: nothing (Qwen3), an open thought
# (Qwen3.5, and models that always think), or an empty one (with enable_thinking: false). Qwen3's template
# writes the empty one before a reply without a thought, too.
NOTHING, OPEN_THOUGHT, NO_THOUGHT = "", "<think>\n", "<think>\n\n</think>\n\n"
# in an argument, a reader of XML takes it for the end of the argument, and what follows for the next
_ENDS_AN_ARGUMENT = re.compile(r"</parameter>\s*<(?:parameter=|/function>)")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def prompted(body: str, message: Message, *, opens: bool) -> str:
    """Return what the prompt has of a rendered turn (body). opens: whether prompts open a thought. Raises:
    BadRow for a changed reply."""
    content, thought = message["content"], message.get("reasoning_content")
    no_thought = body.startswith(NO_THOUGHT) and THINK not in content and not thought
    start = NO_THOUGHT if no_thought else NOTHING
    rest = body.removeprefix(start)
    calls = message.get("tool_calls")
    if rest == content and not thought and not calls and "think>" not in content:
        return start
    allowed = _renderings(content, thought)
    if calls:
        if not _has_calls(_plain(rest), calls, allowed):
            raise BadRow(f"the chat template changed a call: it wrote {show(rest)}")
    elif _plain(rest) not in allowed or (THINK not in rest and not _is_as_written(rest, content)):
        raise BadRow(f"the chat template changed a reply: it wrote {show(rest)}")
    return OPEN_THOUGHT if opens and rest.startswith(OPEN_THOUGHT) else start


def _has_calls(body: str, calls: list[ToolCall], allowed: list[str]) -> bool:
    """Return whether a turn begins with one of the texts, and has these calls. Raises: BadRow."""
    after = [body[len(text) :] for text in allowed if body.startswith(text)]
    names = re.findall(r'<tool_call>\s*\{"name": "(.*?)", "arguments": ', body)
    if [call["function"]["name"] for call in calls] == names:
        return bool(after)
    return any(_is_xml_of(rest, calls) for rest in after)


def _is_xml_of(text: str, calls: list[ToolCall]) -> bool:
    """Return whether a text is these calls as XML, whatever white space is around their parts. Text is
    written as it is, other values as JSON or as Python has them. Raises: BadRow."""
    rest: str | None = text
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        rest = _after(rest, "<tool_call>", f"<function={name}>")
        for key, value in arguments.items():
            rest = _after_one_of(_after(rest, f"<parameter={key}>"), _spellings(key, value))
        rest = _after(rest, "</function>", "</tool_call>")
    return rest is not None and not rest.strip()


def _spellings(key: str, value: object) -> list[str]:
    if not isinstance(value, str):
        return [json.dumps(value, ensure_ascii=False), str(value)]
    if _ENDS_AN_ARGUMENT.search(value):
        raise BadRow(f"a call's argument {key} has text that reads as its own end: {show(value)}")
    return [value]


def _after_one_of(text: str | None, values: list[str]) -> str | None:
    """Return what follows one of the values and the end of the argument; None if none is there."""
    ends = (_after(text, _together(value), "</parameter>") for value in values)
    return next((end for end in ends if end is not None), None)


def _after(text: str | None, *parts: str) -> str | None:
    """Return what follows the parts, with any white space before each; None if they are not there."""
    for part in parts:
        stripped = part.strip()
        if text is None or not text.lstrip().startswith(stripped):
            return None
        text = text.lstrip()[len(stripped) :]
    return text


def _is_as_written(body: str, content: str) -> bool:
    """Return whether a reply is as its row has it, or trimmed: white space that is added would be learnt."""
    answer = content.rpartition(THOUGHT)[2]
    trims = (
        str,
        str.strip,
        str.lstrip,
        str.rstrip,
        lambda text: text.lstrip("\n"),
        lambda text: text.strip("\n"),
    )
    return any(body == trim(text) for text in (content, answer) for trim in trims)


def _renderings(reply: str, thought: str | None) -> list[str]:
    """Return what a template may write for a reply: with its thought, or (in earlier turns) without."""
    outside = [_plain(f"{THINK}{thought}{THOUGHT}{reply}")] if thought else []
    if THINK not in reply and THOUGHT not in reply:
        return [_plain(reply), *outside]
    inside = _THOUGHT.fullmatch(reply)
    if not inside or "think>" in inside[1] + inside[2]:
        raise BadRow(
            "a reply has a stray <think> or </think>, from which Qwen's templates cut text away; a thought"
            " stands once, at the start: <think>...</think>answer"
        )
    return [_plain(f"{THINK}{inside[1]}{THOUGHT}{inside[2]}"), _plain(inside[2]), *outside]


def _plain(text: str) -> str:
    """Return a reply without the white space that templates move: around it, and around its thought."""
    return _together(text.strip())


def _together(text: str) -> str:
    return re.sub(r"\s*(</?think>)\s*", r"\1", text) if "think>" in text else text
