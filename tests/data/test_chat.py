"""Trained tokens, decoded, are exactly the replies and their end-of-turn; ids are the template's own."""

import copy
import json

import pytest
from chats import conversations, encode, normal, pick, row_of, said, trained_texts, with_template
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, forget_calls
from qwenlora.data.rows import Row
from qwenlora.data.sources import find
from qwenlora.data.tokenise import read_rows

NAMES = ("tiny", "qwen2.5", "qwen3")
CHATS = (
    "medical_qa_sharegpt.jsonl",
    "medical_multiturn_messages.jsonl",
    "smilechat_messages_2k.jsonl",
    "alpaca_zh_demo.json",
    "identity.json",
)


def assert_is_the_call(tokenizer, text: str, message) -> None:
    """Assert that a trained text is what the template writes for calls, read back as JSON."""
    assert text.endswith("<|im_end|>")
    blocks = text.removesuffix("<|im_end|>").split("<tool_call>\n")[1:]
    # the texts in them may hold the markup's own words: each block is read as far as JSON goes
    found = [json.JSONDecoder().raw_decode(block)[0] for block in blocks if block.startswith('{"name": ')]
    made = [call["function"] for call in message["tool_calls"]]
    assert json.loads(normal(tokenizer, json.dumps(made, ensure_ascii=False))) == found


@pytest.mark.parametrize("name", NAMES)
@given(value=conversations())
@settings(max_examples=300, deadline=None)
def test_what_is_trained_is_each_reply_and_its_end(tokenizers, name, value):
    tokenizer = pick(tokenizers, name)
    row = row_of(value)
    tokens = encode(tokenizer, row)
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(
        row.messages, tools=row.tools, return_dict=False
    )
    replies = [message for message in row.messages if message["role"] == "assistant"]
    texts = trained_texts(tokenizer, tokens)
    assert len(texts) == len(replies)
    for text, message in zip(texts, replies, strict=True):
        if message.get("tool_calls"):
            assert_is_the_call(tokenizer, text, message)
        else:
            assert text == normal(tokenizer, message["content"]) + "<|im_end|>"


CALL_1, CALL_2 = ({"name": "天气", "arguments": {"city": city}} for city in ("北京", "上海"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "function_call", "value": json.dumps(call)} for call in (CALL_1, CALL_2)],
        [{"from": "function_call", "value": json.dumps([CALL_1, CALL_2])}],
        [{"role": "assistant", "tool_calls": [CALL_1, CALL_2]}],
        [{"role": "assistant", "content": "\n ", "tool_calls": [call]} for call in (CALL_1, CALL_2)],
    ],
)
def test_a_turn_ends_after_its_last_call(tokenizers, name, turns):
    """A call and a reply to it each get one end; so do calls in a row, and the observations after them."""
    tokenizer = pick(tokenizers, name)
    said_first = {"role": "assistant", "content": "我查。"}
    seen = [{"role": "tool", "content": text} for text in ("晴", "雨")]
    block = '<tool_call>\n{"name": "天气", "arguments": {"city": "CITY"}}\n</tool_call>'
    both = f"{block.replace('CITY', '北京')}\n{block.replace('CITY', '上海')}<|im_end|>"
    for before in ([], [said_first]):
        row = row_of({"messages": [{"role": "user", "content": "问"}, *before, *turns, *seen, said_first]})
        tokens = encode(tokenizer, row)
        said_before = "我查。\n" if before else ""
        assert trained_texts(tokenizer, tokens) == [said_before + both, "我查。<|im_end|>"]
        assert "晴\n</tool_response>\n<tool_response>\n雨" in tokenizer.decode(tokens.ids)


def test_calls_after_an_observation_are_a_turn_of_their_own(tokenizers):
    call = {"from": "function_call", "value": json.dumps(CALL_1)}
    row = row_of(
        {"messages": [{"role": "user", "content": "问"}, *[call, {"role": "tool", "content": "晴"}] * 2]}
    )
    assert len(trained_texts(tokenizers["qwen3"], encode(pick(tokenizers, "qwen3"), row))) == 2


@pytest.mark.parametrize("name", NAMES)
@given(
    texts=st.lists(said, min_size=1, max_size=4),
    truncation=st.none()
    | st.fixed_dictionaries(
        {"max_length": st.integers(1, 20), "direction": st.sampled_from(["left", "right"])}
    ),
    padding=st.none()
    | st.fixed_dictionaries(
        {"length": st.none() | st.integers(1, 99), "direction": st.sampled_from(["left", "right"])}
    ),
    splits=st.booleans(),
    dropout=st.sampled_from([None, 0.5]),
)
@settings(max_examples=50, deadline=None)
def test_what_earlier_calls_left_in_a_tokenizer_never_changes_ids(
    tokenizers, name, texts, truncation, padding, splits, dropout
):
    tokenizer = pick(tokenizers, name)
    rows = [
        row_of({"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}]})
        for t in texts
    ]
    rows.append(row_of({"text": "<|im_end|>".join(texts)}))
    forget_calls(tokenizer)
    expected = Encoder(tokenizer).encode(rows)
    encoder, backend = Encoder(tokenizer), tokenizer.backend_tokenizer
    if truncation:
        backend.enable_truncation(**truncation)
    if padding:
        backend.enable_padding(**padding)
    backend.encode_special_tokens, backend.model.dropout = splits, dropout
    for found in (encoder.encode(rows), Encoder(tokenizer).encode(rows)):
        for one, other in zip(found, expected, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.trained.tolist() == other.trained.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", CHATS)
def test_every_reply_of_real_data_is_trained_whole(assets, tokenizers, name, file):
    tokenizer = pick(tokenizers, name)
    source = find(Data(train=str(assets / "data" / file)))
    rows = [row for *_, row in read_rows(source) if not isinstance(row, BadRow)]
    assert len(rows) >= {"smilechat_messages_2k.jsonl": 1996, "identity.json": 91}.get(file, 900)
    for row, tokens in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
        replies = [
            normal(tokenizer, m["content"]) + "<|im_end|>" for m in row.messages if m["role"] == "assistant"
        ]
        assert not isinstance(tokens, BadRow), tokens
        assert trained_texts(tokenizer, tokens) == replies, row.line


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_real_data_are_the_templates_own(assets, tokenizers, name):
    tokenizer = pick(tokenizers, name)
    for file in CHATS:
        rows = [row for *_, row in read_rows(find(Data(train=str(assets / "data" / file))))][:200]
        rows = [row for row in rows if not isinstance(row, BadRow)]
        for row, tokens in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
            assert tokens.ids.tolist() == tokenizer.apply_chat_template(row.messages, return_dict=False)


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_qwen3_trains_a_thought_where_the_template_keeps_it(tokenizers, key):
    tokenizer = pick(tokenizers, "qwen3")

    def reply(answer: str) -> dict:
        if key == "content":
            return {"role": "assistant", "content": f"<think>\n想{answer}\n</think>\n\n{answer}"}
        return {"role": "assistant", "content": answer, "reasoning_content": f"想{answer}"}

    question = {"role": "user", "content": "问"}
    tokens = encode(tokenizer, row_of({"messages": [question, reply("一"), question, reply("二")]}))
    # the rendering is not prefix-stable: the thought of an earlier turn is left out
    assert trained_texts(tokenizer, tokens) == ["一<|im_end|>", "<think>\n想二\n</think>\n\n二<|im_end|>"]
    plain = encode(tokenizer, row_of({"instruction": "问", "output": "好。"}))
    assert trained_texts(tokenizer, plain) == [
        "好。<|im_end|>"
    ]  # without thinking: the empty block is the prompt's


EMPTY_THOUGHTS = [
    "<think>\n\n</think>\n\n",
    "<think></think>",
    " <think> \n\t</think>\n",
    "<think>\n</think>\r\n",
]


@pytest.mark.parametrize("empty", EMPTY_THOUGHTS)
@given(answers=st.lists(st.tuples(said, st.booleans()), min_size=1, max_size=3), called=st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_empty_thought_in_the_data_is_masked_as_the_templates_own(tokenizers, empty, answers, called):
    tokenizer = pick(tokenizers, "qwen3")

    def row(*, thoughts: bool) -> Row:
        turns = []
        for answer, has_thought in answers:
            text = (empty if thoughts and has_thought else "") + answer.lstrip()
            turns += [{"role": "user", "content": "问"}, {"role": "assistant", "content": text}]
        if called:
            turns[-1]["tool_calls"] = [CALL_1]
        return row_of({"messages": turns})

    expected, found = (encode(tokenizer, row(thoughts=thoughts)) for thoughts in (False, True))
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()


def test_an_empty_thought_is_trained_where_no_prompt_has_it(tokenizers):
    tokens = encode(
        pick(tokenizers, "qwen2.5"), row_of({"instruction": "问", "output": f"{EMPTY_THOUGHTS[0]}答"})
    )
    assert trained_texts(tokenizers["qwen2.5"], tokens) == [f"{EMPTY_THOUGHTS[0]}答<|im_end|>"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blank", ["", " ", "\n", None])
def test_a_blank_reasoning_content_is_no_thought(tokenizers, name, blank):
    turns = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答", "reasoning_content": blank},
    ]
    tokens = encode(pick(tokenizers, name), row_of({"messages": turns}))
    assert trained_texts(tokenizers[name], tokens) == ["答<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2.5"])
def test_a_thought_that_the_template_would_leave_out_is_refused(tokenizers, name):
    value = {
        "messages": [
            {"role": "user", "content": "问"},
            {"role": "assistant", "content": "答", "reasoning_content": "想"},
        ]
    }
    with pytest.raises(
        BadRow, match=r"reasoning_content, which this model's template leaves out; write it into"
    ):
        encode(pick(tokenizers, name), row_of(value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reply", ["好。\n", "  indented", "line\n\nline ", "a\tb\r\nc", "\u3000全角", "e\u0301"]
)
def test_white_space_of_a_reply_is_trained_as_it_is(tokenizers, name, reply):
    tokenizer = pick(tokenizers, name)
    tokens = encode(tokenizer, row_of({"instruction": "问", "output": reply}))
    assert trained_texts(tokenizer, tokens) == [normal(tokenizer, f"{reply}<|im_end|>")]


@pytest.mark.parametrize("name", NAMES)
def test_empty_lines_before_a_reply_are_not_trained(tokenizers, name):
    tokenizer = pick(tokenizers, name)
    tokens = encode(tokenizer, row_of({"instruction": "问", "output": " \n\n\r\n好。"}))
    assert trained_texts(tokenizer, tokens) == ["好。<|im_end|>"]


TWO = {
    "messages": [
        {"role": "user", "content": "问一"},
        {"role": "assistant", "content": "答一"},
        {"role": "user", "content": "问二"},
        {"role": "assistant", "content": "答二"},
    ]
}


@pytest.mark.parametrize("name", NAMES)
def test_train_on_says_what_is_learnt(tokenizers, name):
    tokenizer = pick(tokenizers, name)
    assert trained_texts(tokenizer, encode(tokenizer, row_of(TWO), "assistant")) == [
        "答一<|im_end|>",
        "答二<|im_end|>",
    ]
    assert trained_texts(tokenizer, encode(tokenizer, row_of(TWO), "last_assistant")) == ["答二<|im_end|>"]
    all_ = encode(tokenizer, row_of(TWO), "all")
    assert all_.trained.sum() == len(all_.ids) - 1
    assert not all_.trained[0]


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_is_trained_whole_and_ends_with_the_end_of_text(tokenizers, name):
    tokenizer = pick(tokenizers, name)
    tokens = encode(tokenizer, row_of({"text": "春眠不觉晓，处处闻啼鸟。"}))
    assert tokenizer.decode(tokens.ids) == "春眠不觉晓，处处闻啼鸟。<|endoftext|>"
    assert tokens.trained.tolist() == [False] + [True] * (len(tokens.ids) - 1)


def rows_with(mark: str) -> dict[str, dict]:
    """Return {part of a row: a row with a mark in this part}."""
    question, answer = ({"role": role, "content": "s"} for role in ("user", "assistant"))
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": mark}}]}
    return {
        "a turn (system)": {"messages": [{"role": "system", "content": f"a{mark}"}, question, answer]},
        "a turn (user)": {"messages": [question | {"content": f"a{mark}b"}, answer]},
        "a turn (assistant)": {"messages": [question, answer | {"content": f"{mark}b"}]},
        "a turn (tool)": {"messages": [question, answer, {"role": "tool", "content": mark}, answer]},
        "a turn (assistant) ": {"messages": [question, call]},
        "a turn (assistant)  ": {"messages": [question, answer | {"reasoning_content": mark}]},
        "the list of tools": {"messages": [question, answer], "tools": [{"name": "f", "description": mark}]},
    }


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_of_the_tokenizer_in_a_turn_are_refused(tokenizers, name):
    tokenizer = copy.deepcopy(pick(tokenizers, name))
    tokenizer.add_special_tokens({"bos_token": "[BEGIN]"})
    parts = {"tiny": slice(0, 7), "qwen2.5": slice(0, 5), "qwen3": slice(0, 7)}[
        name
    ]  # that its template writes
    for mark in ("<|endoftext|>", "[BEGIN]"):
        places, rows = zip(*list(rows_with(mark).items())[parts], strict=True)
        for place, found in zip(places, Encoder(tokenizer).encode(list(map(row_of, rows))), strict=True):
            assert (
                str(found) == f"{place.strip()} contains {mark}, a control token of this tokenizer; remove it"
            )


def test_a_control_token_that_the_template_writes_is_no_fault(tokenizers):
    tokenizer = with_template(tokenizers["tiny"], "<|endoftext|>" + CHATML.replace("CONTENT", "m.content"))
    tokens = encode(tokenizer, row_of({"instruction": "ask", "output": "say"}))
    assert trained_texts(tokenizer, tokens) == ["say<|im_end|>"]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + CONTENT + '<|im_end|>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("CONTENT", "m.content | upper"), "the chat template changed a reply: it wrote"),
        (CHATML.replace("CONTENT", "m.content").replace("m.role", "'user'"), "wrote 0 assistant turns for 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this row: roles must alternate"),
        (
            CHATML.replace("CONTENT", "m.content").replace("<|im_end|>\\n", "\\n"),
            "wrote 0 assistant turns for 1",
        ),
        (CHATML.replace("CONTENT", "m.content") + "<|im_start|>", "turns do not end as they begin"),
        (CHATML.replace("CONTENT", "'\\n' + m.content"), "the chat template changed a reply: it wrote"),
    ],
)
def test_a_template_that_would_train_something_else_is_refused(tokenizers, template, reason):
    with pytest.raises(BadRow, match=".") as caught:
        encode(with_template(tokenizers["tiny"], template), row_of({"instruction": "ask", "output": "say"}))
    assert reason in str(caught.value)


def test_a_reply_that_melts_with_the_line_break_before_it_is_refused(tokenizers):
    tokenizer = pick(
        tokenizers, "qwen3"
    )  # its template cuts the thought and leaves " \n one", which begins with a line
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>a</think> \n one"},
    ] * 2
    with pytest.raises(
        BadRow, match="first characters melt with the line break before it; remove white space there"
    ):
        encode(tokenizer, row_of({"messages": turns}))


def test_any_chatml_template_is_taken(tokenizers):
    tokenizer = with_template(
        tokenizers["tiny"], "Chat: " + CHATML.replace("CONTENT", "m.content | trim") + "End"
    )
    tokens = encode(tokenizer, row_of(TWO))
    assert trained_texts(tokenizer, tokens) == ["答一<|im_end|>", "答二<|im_end|>"]


def test_a_stray_think_mark_is_refused(tokenizers):
    for reply in ("so </think> yes", "<think>a</think>b<think>c</think>", "yes <think>"):
        with pytest.raises(BadRow, match="stray <think> or </think>"):
            encode(tokenizers["tiny"], row_of({"instruction": "q", "output": reply}))


def test_a_call_is_trained_as_the_template_writes_it(tokenizers):
    tokenizer = pick(tokenizers, "qwen3")
    value = {
        "messages": [
            {"role": "user", "content": "天气？"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "北京"}'}}],
            },
            {"role": "tool", "content": "晴"},
            {"role": "assistant", "content": "晴天。"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    }
    tokens = encode(tokenizer, row_of(value))
    assert trained_texts(tokenizer, tokens) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
        "晴天。<|im_end|>",
    ]
    assert '<tools>\n{"type": "function"' in tokenizer.decode(tokens.ids)
