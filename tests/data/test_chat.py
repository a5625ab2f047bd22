"""Trained tokens, decoded, are exactly the replies and their end-of-turn; ids are the template's own."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlora.data.chat import encode, reply_spans
from qwenlora.data.rows import Row, read_rows, to_messages

NAMES = ("tiny", "qwen2.5", "qwen3")
words = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn"]), min_size=1, max_size=30)
said = words.map(str.strip).filter(lambda text: text and "<|im_" not in text and "think>" not in text)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 4))
    messages = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(said)}, {"role": "assistant", "content": draw(said)}]
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(said)})
    return Row("my.jsonl:1", messages)


def pick(tokenizers, name):
    if name not in tokenizers:
        pytest.skip(f"the {name} tokenizer is not here")
    return tokenizers[name]


def trained_texts(tokenizer, tokens) -> list[str]:
    """Return the text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.trained.view(np.int8), [0]])))
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", NAMES)
@given(row=conversations())
@settings(max_examples=150, deadline=None)
def test_what_is_trained_is_each_reply_and_its_end(tokenizers, name, row):
    tokenizer = pick(tokenizers, name)
    (tokens,) = encode(tokenizer, [row])
    replies = [m["content"] + "<|im_end|>" for m in row.messages if m["role"] == "assistant"]
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str  # tokens hold NFC text
    assert trained_texts(tokenizer, tokens) == [normal(reply) for reply in replies]
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(row.messages, return_dict=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["medical_multiturn_messages.jsonl", "alpaca_zh_demo.json", "identity.json"])
def test_every_reply_of_real_data_is_trained_whole(assets, tokenizers, name, file):
    tokenizer = pick(tokenizers, name)
    rows = read_rows([Path(assets) / "data" / file])
    for row, tokens in zip(rows, encode(tokenizer, rows), strict=True):
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str
        replies = [normal(m["content"]) + "<|im_end|>" for m in row.messages if m["role"] == "assistant"]
        texts = trained_texts(tokenizer, tokens)
        assert len(texts) == len(replies)
        assert texts == replies, row.place


def test_qwen3_trains_a_given_thought_but_not_the_empty_one(tokenizers):
    tokenizer = pick(tokenizers, "qwen3")
    thought = "<think>\n想一想。\n</think>\n\n好。"
    rows = [
        Row("x", [{"role": "user", "content": "问"}, {"role": "assistant", "content": reply}])
        for reply in ("好。", thought)
    ]
    plain, thinking = encode(tokenizer, rows)
    assert trained_texts(tokenizer, plain) == ["好。<|im_end|>"]
    assert trained_texts(tokenizer, thinking) == [f"{thought}<|im_end|>"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reply", ["好。\n", "  indented", "line\n\nline ", "a\tb\r\nc"])
def test_white_space_of_a_reply_is_trained_as_it_is(tokenizers, name, reply):
    tokenizer = pick(tokenizers, name)
    (tokens,) = encode(tokenizer, [Row("x", to_messages({"instruction": "问", "output": reply}))])
    assert trained_texts(tokenizer, tokens) == [f"{reply}<|im_end|>"]


@pytest.mark.parametrize("name", NAMES)
def test_empty_lines_before_a_reply_are_not_part_of_it(tokenizers, name):
    tokenizer = pick(tokenizers, name)
    (tokens,) = encode(tokenizer, [Row("x", to_messages({"instruction": "问", "output": " \n\n好。"}))])
    assert trained_texts(tokenizer, tokens) == ["好。<|im_end|>"]


def test_an_empty_thought_that_the_data_has_is_trained(tokenizers):
    said = "<think>\n\n</think>\n\n好。"
    for name in ("qwen2.5", "qwen3"):
        tokenizer = pick(tokenizers, name)
        (tokens,) = encode(tokenizer, [Row("x", to_messages({"instruction": "问", "output": said}))])
        assert trained_texts(tokenizer, tokens) == [f"{said}<|im_end|>"]


def test_qwen3_leaves_out_the_thoughts_of_earlier_turns(tokenizers):
    tokenizer = pick(tokenizers, "qwen3")
    turn = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "<think>\n想。\n</think>\n\n好。"}]
    (tokens,) = encode(tokenizer, [Row("x", turn * 2)])
    assert trained_texts(tokenizer, tokens) == ["好。<|im_end|>", "<think>\n想。\n</think>\n\n好。<|im_end|>"]


@pytest.mark.parametrize(
    "said", ["Write </think> at the end.", "a<think>b</think>c", "<think>a</think>b</think>c", "<think>a", "</think>a"]
)
def test_a_stray_thought_mark_is_refused_because_templates_cut_text_there(tokenizers, said):
    tokenizer = pick(tokenizers, "qwen3")
    with pytest.raises(ValueError, match="my.jsonl:7: a reply has a stray <think> or </think>"):
        encode(tokenizer, [Row("my.jsonl:7", to_messages({"instruction": "问", "output": said}))])


def test_a_template_that_is_not_chatml_is_refused():
    row = Row("my.jsonl:7", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match=r"my\.jsonl:7: the chat template wrote 0 assistant turns for 1"):
        reply_spans("[INST] q [/INST] a</s>", row)
    with pytest.raises(ValueError, match=r"my\.jsonl:7: the chat template changed a reply: it wrote 'A'"):
        reply_spans("<|im_start|>assistant\nA<|im_end|>", row)


def test_a_row_that_the_template_refuses_is_named(tokenizers):
    tokenizer = tokenizers["tiny"]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    try:
        with pytest.raises(ValueError, match=r"my\.jsonl:7: the model's chat template refuses .*no system turns here"):
            encode(tokenizer, [Row("my.jsonl:7", [{"role": "user", "content": "q"}])])
    finally:
        tokenizer.chat_template = template
