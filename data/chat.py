"""A conversation as tokens, and which of them are trained: the replies and their end-of-turn token.

The ids are those of `tokenizer.apply_chat_template(messages, tokenize=True)`, since the same rendered text is
tokenised whole. Qwen's templates mark no replies ({% generation %} is missing), so a reply is found in the rendered
text between `<|im_start|>assistant\\n` and `<|im_end|>`; rows.py refuses text that could forge these.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwenlora.data.rows import TURN_END, Row

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
# Qwen3 writes this before a reply that was not thought about: it is what the generation prompt holds, not the reply
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Tokens(NamedTuple):
    """One row. ids: int32 [length]; trained: bool [length], true where the token is learnt. trained[0] is false."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]


def encode(tokenizer: Any, rows: list[Row]) -> list[Tokens]:
    """Return the tokens of each row. tokenizer: a fast tokenizer with a ChatML template.

    Raises: ValueError naming the first row that the template refuses or renders otherwise than as ChatML.
    """
    texts, spans = [], []
    for row in rows:
        text = render(tokenizer, row)
        texts.append(text)
        spans.append(reply_spans(text, row))
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        Tokens(np.asarray(ids, np.int32), _inside(np.asarray(offsets, np.int64).reshape(-1, 2), row_spans))
        for ids, offsets, row_spans in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
    ]


def render(tokenizer: Any, row: Row) -> str:
    """Return the conversation as the model's own template writes it."""
    try:
        text: str = tokenizer.apply_chat_template(row.messages, tokenize=False)
    except Exception as error:  # a template raises what it likes (jinja2's raise_exception)
        raise ValueError(f"{row.place}: the model's chat template refuses this row: {error}") from error
    return text


def reply_spans(text: str, row: Row) -> list[tuple[int, int]]:
    """Return [start, end) in characters of every reply in the rendered text, its end-of-turn token included."""
    turns = [match for match in _TURN.finditer(text) if match[1] == "assistant"]
    replies = [message for message in row.messages if message["role"] == "assistant"]
    if len(turns) != len(replies):
        raise ValueError(
            f"{row.place}: the chat template wrote {len(turns)} assistant turns for {len(replies)};"
            " expected ChatML (<|im_start|>assistant ... <|im_end|>), as all Qwens have"
        )
    spans = []
    for turn, reply in zip(turns, replies, strict=True):
        start, body, said = turn.start(2), turn[2], reply["content"]
        if body.startswith(_NO_THOUGHT) and "<think>" not in said:
            start += len(_NO_THOUGHT)
            body = body.removeprefix(_NO_THOUGHT)
        if _plain(body) not in _renderings(row, said):
            raise ValueError(f"{row.place}: the chat template changed a reply: it wrote {body[:60]!r}")
        spans.append((start, turn.end(2) + len(TURN_END)))
    return spans


def _renderings(row: Row, said: str) -> tuple[str, ...]:
    """Return what a template may make of a reply: all of it, or (in earlier turns) the answer without the thought."""
    if "<think>" not in said and "</think>" not in said:
        return (_plain(said),)
    thought = _THOUGHT.fullmatch(said)
    if not thought or "think>" in thought[1] + thought[2]:
        raise ValueError(
            f"{row.place}: a reply has a stray <think> or </think>, from which Qwen's templates cut text away;"
            " a thought stands once, at the start: <think>...</think>answer"
        )
    return _plain(f"<think>{thought[1]}</think>{thought[2]}"), _plain(thought[2])


def _plain(text: str) -> str:
    """Return a reply without the white space that templates move: around it, and around its thought."""
    return re.sub(r"\s*(</?think>)\s*", r"\1", text.strip())


def _inside(offsets: npt.NDArray[np.int64], spans: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Return bool [tokens]: true where a token's characters lie wholly inside one of the spans."""
    trained = np.zeros(len(offsets), np.bool_)
    for start, end in spans:
        trained |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    trained[:1] = False  # the first token has nothing before it to be predicted from
    return trained
