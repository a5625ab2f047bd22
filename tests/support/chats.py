"""Chat rows of all kinds for Hypothesis, and what of them is trained."""

import copy
import json

import numpy as np
import pytest
from hypothesis import strategies as st

from qwenlora.data.bad_row import BadRow, or_bad
from qwenlora.data.chat import Encoder
from qwenlora.data.marks import refuse_media
from qwenlora.data.rows import Row, to_row
from qwenlora.data.shapes import RowOptions, shape_of

letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn"])
# text of all kinds, and what is near to chat markup, white space and the template's own words
words = st.text(letters, min_size=1, max_size=30) | st.sampled_from(
    [
        "assistant",
        "<|im_",
        "im_end|>",
        "\n\nuser\n",
        "<tool_call>",
        "a \n\n b",
        "  indented",
        "end \n",
        "<|endoftext",
        "é",
    ]
)
clean = words.filter(lambda text: text.strip() and "<|im_start|>" not in text and "think>" not in text)
# Hypothesis also draws the texts that stand in loaded modules, as control tokens and marks of images: refused
said = (
    st.lists(clean, min_size=1, max_size=3)
    .map("".join)
    .filter(lambda text: "<|im_end|>" not in text and "<|endoftext|>" not in text)
    .filter(lambda text: or_bad(refuse_media, {}, [{"role": "user", "content": text}]) is None)
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["天气", "get_time", "x"]),
            "arguments": st.dictionaries(said, said, max_size=2),
        }
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def calling(draw):
    """An assistant's turn with calls, as one message or as several in a row, perhaps with a reply before
    them."""
    made = draw(calls)
    kept = draw(st.integers(0, len(made)))
    reply = {"role": "assistant", "content": draw(said) if draw(st.booleans()) else ""}
    first = reply | ({"tool_calls": [{"function": call} for call in made[:kept]]} if kept else {})
    rest = [{"role": "function_call", "content": json.dumps(call)} for call in made[kept:]]
    return ([first] if kept or reply["content"] else []) + rest


@st.composite
def conversations(draw):
    """Rows as people have them: with and without a system turn, a last question, two turns of one role in a
    row."""
    turns = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    for role in draw(
        st.lists(st.sampled_from(["user", "assistant", "user assistant", "tools"]), min_size=1, max_size=5)
    ):
        if role == "tools":
            turns.append({"role": "user", "content": draw(said)})
            turns += draw(calling())
            turns += [
                {"role": "tool", "content": text} for text in draw(st.lists(said, min_size=1, max_size=2))
            ]
        else:
            turns += [{"role": one, "content": draw(said)} for one in role.split()]
    turns.append({"role": "assistant", "content": draw(said)})
    if draw(st.booleans()):
        turns.append({"role": "user", "content": draw(said)})
    row = {"messages": turns}
    return row | {"tools": [{"name": "天气", "parameters": {}}]} if draw(st.booleans()) else row


def pick(tokenizers, name):
    if name not in tokenizers:
        pytest.skip(f"the {name} tokenizer is not here")
    return tokenizers[name]


def row_of(value, line: int = 1) -> Row:
    return to_row(line, value, shape_of(value, RowOptions()), RowOptions())


def encode(tokenizer, row: Row, train_on: str = "assistant"):
    (tokens,) = Encoder(tokenizer, train_on).encode([row])
    if isinstance(tokens, BadRow):
        raise tokens
    return tokens


def trained_texts(tokenizer, tokens) -> list[str]:
    """Return the text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.trained.view(np.int8), [0]])))
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def normal(tokenizer, text: str) -> str:
    return tokenizer.backend_tokenizer.normalizer.normalize_str(text)  # tokens hold NFC text


def with_template(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed
