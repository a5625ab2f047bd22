"""Long rows: cut, dropped or split, and what is trained of them keeps its question and fits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder
from qwenlora.data.overlength import cut_to_length
from qwenlora.data.rows import to_row
from qwenlora.data.shapes import RowOptions, shape_of


@pytest.fixture(scope="module")
def fitted(tokenizers):
    """Return what becomes of a row: the pieces, as {text, trained: [texts]}, and the outcome."""

    def fitted(value, **options):
        tokenizer = tokenizers["tiny"]
        data = Data(train="x", **options)
        encoder = Encoder(tokenizer, data.train_on)
        row = to_row(1, value, shape_of(value, RowOptions()), RowOptions())
        (tokens,) = encoder.encode([row])
        outcome = cut_to_length(row, tokens, encoder, data)
        pieces = []
        for piece in outcome.pieces:
            assert len(piece.ids) <= data.max_length
            assert piece.trained.any()
            assert not piece.trained[0]
            edges = np.flatnonzero(np.diff(np.concatenate([[0], piece.trained.view(np.int8), [0]])))
            spans = zip(edges[::2], edges[1::2], strict=True)
            pieces.append((tokenizer.decode(piece.ids), [tokenizer.decode(piece.ids[a:b]) for a, b in spans]))
        return pieces, outcome, tokens

    return fitted


def chat(*replies: str, system: str = "") -> dict:
    turns = [{"role": "system", "content": system}] if system else []
    for number, reply in enumerate(replies):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": reply}]
    return {"messages": turns}


def test_truncating_keeps_the_beginning_and_some_of_the_reply(fitted):
    pieces, outcome, tokens = fitted(chat("word " * 50), overlength="truncate", max_length=30)
    assert outcome.truncated
    assert len(pieces) == 1
    assert outcome.pieces[0].ids.tolist() == tokens.ids[:30].tolist()


def test_truncating_refuses_to_leave_nothing_to_train_on(fitted):
    with pytest.raises(
        BadRow, match=r"truncated to data\.max_length=30 tokens of \d+, nothing of the reply is left"
    ):
        fitted({"instruction": "word " * 50, "output": "a"}, overlength="truncate", max_length=30)


@pytest.mark.parametrize("overlength", ["drop", "error"])
def test_a_dropped_row_has_no_pieces(fitted, overlength):
    assert fitted(chat("word " * 50), overlength=overlength, max_length=30)[0] == []


def test_a_split_conversation_keeps_every_reply_once_with_its_question_and_the_system_turn(fitted):
    replies = [f"reply {n} " + "word " * n for n in range(8)]
    pieces, outcome, _ = fitted(chat(*replies, system="be kind"), overlength="split", max_length=120)
    assert len(pieces) > 1
    assert outcome.lost_replies == 0
    assert [reply for _, trained in pieces for reply in trained] == [
        f"{reply}<|im_end|>" for reply in replies
    ]
    for text, trained in pieces:
        assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n")
        for reply in trained:
            number = reply.split()[1]
            assert f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n{reply}" in text


def test_every_piece_of_a_split_row_has_its_tools(tokenizers):
    if "qwen3" not in tokenizers:
        pytest.skip("the qwen3 tokenizer is not here")
    value = chat(*(f"reply {n} " + "word " * 20 for n in range(8))) | {"tools": [{"name": "weather"}]}
    encoder, data = Encoder(tokenizers["qwen3"]), Data(train="x", overlength="split", max_length=250)
    row = to_row(1, value, "chat", RowOptions())
    (tokens,) = encoder.encode([row])
    pieces = cut_to_length(row, tokens, encoder, data).pieces
    assert len(pieces) > 1
    tools = '<tools>\n{"type": "function", "function": {"name": "weather"}}'
    assert all(tools in tokenizers["qwen3"].decode(piece.ids) for piece in pieces)


def test_two_exchanges_that_just_fit_stay_together(fitted):
    turns = chat("one", "two", "three")
    both = len(fitted(chat("one", "two"), max_length=4096, overlength="truncate")[2].ids)
    pieces, _, _ = fitted(turns, overlength="split", max_length=both)
    assert [len(trained) for _, trained in pieces] == [2, 1]


def test_a_reply_that_fits_nowhere_is_counted_not_cut(fitted):
    pieces, outcome, _ = fitted(chat("short", "word " * 99, "end"), overlength="split", max_length=60)
    assert [reply for _, trained in pieces for reply in trained] == ["short<|im_end|>", "end<|im_end|>"]
    assert outcome.lost_replies == 1


def test_split_replies_goes_on_without_the_question_because_it_was_asked_to(fitted):
    long = " ".join(str(n) for n in range(60))
    pieces, outcome, _ = fitted(chat(long), overlength="split", max_length=50, split_replies=True)
    assert outcome.lost_replies == 0
    # the first token of a piece is not predicted; it was the last one of the piece before
    assert "".join(reply for _, trained in pieces for reply in trained) == f"{long}<|im_end|>"


def test_with_last_assistant_a_split_keeps_the_end_of_the_conversation(fitted):
    replies = [f"reply {n} " + "word " * 5 for n in range(8)]
    pieces, _, _ = fitted(chat(*replies), overlength="split", max_length=90, train_on="last_assistant")
    assert [trained for _, trained in pieces] == [[f"{replies[-1]}<|im_end|>"]]
    assert (
        fitted(chat("a", "word " * 99), overlength="split", max_length=60, train_on="last_assistant")[
            1
        ].lost_replies
        == 1
    )
    assert "q6" in pieces[0][0]
    assert "q0" not in pieces[0][0]


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=30, max_size=200),
    size=st.integers(8, 40),
)
@settings(deadline=None, max_examples=50)
def test_every_token_of_a_split_text_is_trained_once(tokenizers, text, size):
    encoder = Encoder(tokenizers["tiny"])
    if not text.strip():
        return
    row = to_row(1, {"text": text}, "text", RowOptions())
    (tokens,) = encoder.encode([row])
    pieces = cut_to_length(row, tokens, encoder, Data(train="x", max_length=size, overlength="split")).pieces
    assert all(len(piece.ids) <= size for piece in pieces)
    trained = np.concatenate([piece.ids[piece.trained] for piece in pieces])
    assert trained.tolist() == tokens.ids[tokens.trained].tolist()
