"""Masks under chat templates of today: calls as XML, and prompts that open a thought.

The templates here are written for these tests after the documented formats of Qwen3-Coder and Qwen3.5 and its
successors, which differ in whether thoughts of earlier turns are kept, and whether prompts open one unasked.
"""

import copy
import json
from types import SimpleNamespace

import pytest
from chats import conversations, encode, normal, pick, row_of, trained_texts, with_template
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwenlora.data.bad_row import BadRow
from qwenlora.data.template import has_default, set_defaults

SYSTEM = r"""
{%- if tools %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>' ~ ('\n\n' ~ messages[0].content if messages[0].role == 'system' else '') }}
    {{- '<|im_end|>\n' }}
{%- endif %}"""
CALLS = r"""
{%- for call in turn.tool_calls or [] %}
    {{- ('\n\n' if said else '') if loop.first else '\n' }}
    {{- '<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
    {%- for key, value in call.function.arguments.items() %}
        {{- '<parameter=' ~ key ~ '>\n' ~ (value if value is string else VALUE) ~ '\n</parameter>\n' }}
    {%- endfor %}
    {{- '</function>\n</tool_call>' }}
{%- endfor %}"""
TURNS = r"""
{%- for turn in messages if turn.role != 'system' or not tools %}
    {%- if turn.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' ~ turn.content ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif turn.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}REPLY{{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}PROMPT{%- endif %}"""
CODER = SYSTEM + TURNS.replace("PROMPT", "").replace(
    "REPLY",
    "{%- set said = turn.content | trim if turn.tool_calls else turn.content %}{{- said }}"
    + CALLS.replace("VALUE", "(value | string if value is number or value is boolean else value | tojson)"),
)
QUERY = r"""
{%- set query = namespace(last=-1) %}
{%- for turn in messages if turn.role != 'system' or not tools %}
    {%- if turn.role == 'user' %}{%- set query.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if query.last < 0 %}{{- raise_exception('nobody asks') }}{%- endif %}"""
THOUGHTS = r"""
{%- set said, thought = turn.content | trim, turn.reasoning_content | default('') | trim %}
{%- if '</think>' in said %}
    {%- set thought = (said.split('</think>') | first).split('<think>') | last | trim %}
    {%- set said = said.split('</think>') | last | trim %}
{%- endif %}
{%- if preserve_thinking | default(KEEPS) or loop.index0 > query.last %}
    {{- '<think>\n' ~ thought ~ '\n</think>\n\n' }}
{%- endif %}
{{- said }}"""
PROMPT = r"{{- '<think>\n' if enable_thinking | default(THINKS) else '<think>\n\n</think>\n\n' }}"


def thinking(*, keeps: bool, thinks: bool) -> str:
    reply = (THOUGHTS + CALLS).replace("VALUE", "value | tojson").replace("KEEPS", str(keeps).lower())
    prompt = PROMPT.replace("THINKS", str(thinks).lower())
    return SYSTEM + QUERY + TURNS.replace("PROMPT", prompt).replace("REPLY", reply)


TEMPLATES = {
    "coder": CODER,
    "thinking": thinking(keeps=False, thinks=True),
    "thinking when asked": thinking(keeps=False, thinks=False),
    "keeping thoughts": thinking(keeps=True, thinks=True),
}
KEEPING = ("keeping thoughts", "told to keep thoughts")
NAMES = ("tiny", "qwen3")


def told(template: str, **arguments: bool) -> str:
    """Return a template with data.chat_template_kwargs."""
    words = SimpleNamespace(chat_template=template, special_tokens_map={}, name_or_path="words")
    set_defaults(words, arguments)
    return words.chat_template


TEMPLATES["told to keep thoughts"] = told(TEMPLATES["thinking"], preserve_thinking=True)
TEMPLATES["told not to think"] = told(
    TEMPLATES["keeping thoughts"], enable_thinking=False, preserve_thinking=False
)


def trained_text(kind: str, messages: list, index: int) -> str:
    """Return what a model is to write for a reply: after a prompt that opens its thought, if it has one."""
    message = messages[index]
    calls, content = message.get("tool_calls", []), message["content"]
    said = content.strip() if calls or kind != "coder" else content
    blocks = []
    for call in calls:
        arguments = call["function"]["arguments"].items()
        inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
        name = call["function"]["name"]
        blocks.append(f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>")
    asked_again = any(later["role"] == "user" for later in messages[index:])
    thought = message.get("reasoning_content", "").strip()
    if asked_again and kind not in KEEPING:
        thought = ""
    text = f"{thought}\n</think>\n\n" if thought else ""
    return text + said + ("\n\n" if said and blocks else "") + "\n".join(blocks) + "<|im_end|>"


@st.composite
def thoughtful(draw):
    """Rows of all kinds, replies of which have thoughts."""
    row = draw(conversations())
    for turn in row["messages"]:
        if turn["role"] == "assistant" and draw(st.booleans()):
            turn["reasoning_content"] = draw(st.sampled_from(["想", "a\n\nb", " 先查。\n", "<tool_call>"]))
    return row


@pytest.fixture(scope="module")
def copies(tokenizers) -> dict:
    """Return tokenizers that may be given another template; a copy of a real one takes seconds."""
    return {name: copy.deepcopy(tokenizers[name]) for name in NAMES if name in tokenizers}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TEMPLATES)
@given(value=thoughtful())
@settings(max_examples=40, deadline=None)
def test_what_is_trained_is_what_a_model_writes_after_the_prompt(copies, name, kind, value):
    tokenizer = pick(copies, name)
    tokenizer.chat_template = TEMPLATES[kind]
    if kind == "coder":
        value = {**value, "messages": [without_thought(turn) for turn in value["messages"]]}
    row = row_of(value)
    assume(kind == "coder" or any(message["role"] == "user" for message in row.messages))
    tokens = encode(tokenizer, row)
    options = {"tools": row.tools, "return_dict": False}
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(row.messages, **options)
    replies = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    expected = [normal(tokenizer, trained_text(kind, row.messages, number)) for number in replies]
    assert trained_texts(tokenizer, tokens) == expected
    last = row.messages[-1]
    if last["role"] == "assistant":
        thinks = bool(last.get("reasoning_content"))
        prompt = tokenizer.apply_chat_template(
            row.messages[:-1], add_generation_prompt=True, enable_thinking=thinks, **options
        )
        start = len(tokens.ids) - tokens.trained[::-1].argmax()
        while start and (tokens.trained[start - 1] or start > len(prompt)):
            start -= 1
        assert tokens.ids[:start].tolist() == prompt


def without_thought(turn: dict) -> dict:
    return {key: value for key, value in turn.items() if key != "reasoning_content"}


ARGUMENTS = {
    "text": "a\n</parameter>\n <think>b",
    "number": 3,
    "yes": True,
    "list": [1, {"城": "北京"}],
}
CALLING = {
    "messages": [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ARGUMENTS}] * 2},
    ]
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_arguments_of_all_types_are_trained_as_the_template_writes_them(tokenizers, kind):
    tokenizer = with_template(tokenizers["tiny"], TEMPLATES[kind])
    (text,) = trained_texts(tokenizer, encode(tokenizer, row_of(CALLING)))
    yes = "True" if kind == "coder" else "true"
    assert text.count(f"<parameter=yes>\n{yes}\n</parameter>") == 2
    assert text.count(f"<parameter=list>\n{json.dumps(ARGUMENTS['list'], ensure_ascii=False)}\n") == 2
    assert text.count(f"<parameter=text>\n{ARGUMENTS['text']}\n</parameter>") == 2


@pytest.mark.parametrize(
    ("change", "to"),
    [
        ("value is string", "key == 'text'"),  # changes nothing
        ("'<parameter=' ~ key", "'<parameter=' ~ key | upper"),
        ("call.function.arguments.items()", "{}.items()"),
        ("~ call.function.name ~", "~ 'g' ~"),
        ("in turn.tool_calls or []", "in (turn.tool_calls or [])[:1]"),
        ("(value if value is string", "(value | upper if value is string"),
    ],
)
def test_a_call_that_a_template_changes_is_refused(tokenizers, change, to):
    template = TEMPLATES["thinking"]
    assert change in template
    tokenizer = with_template(tokenizers["tiny"], template.replace(change, to))
    if change == "value is string":
        encode(tokenizer, row_of(CALLING))
        return
    with pytest.raises(BadRow, match="the chat template changed a call: it wrote"):
        encode(tokenizer, row_of(CALLING))


@pytest.mark.parametrize("rest", ["<parameter=b>\n2", "</function>"])
def test_an_argument_that_reads_as_its_own_end_is_a_bad_row(tokenizers, rest):
    tokenizer = with_template(tokenizers["tiny"], TEMPLATES["coder"])
    calling = copy.deepcopy(CALLING)
    calling["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {"a": f"1\n</parameter>\n{rest}"}}]
    with pytest.raises(BadRow, match="argument a has text that reads as its own end"):
        encode(tokenizer, row_of(calling))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_thought_inside_a_reply_is_trained_from_where_the_prompt_ends(tokenizers, kind):
    tokenizer = with_template(tokenizers["tiny"], TEMPLATES[kind])
    row = row_of({"instruction": "问", "output": "<think>\n想\n</think>\n\n答"})
    start = "<think>\n" if kind == "coder" else ""
    assert trained_texts(tokenizer, encode(tokenizer, row)) == [f"{start}想\n</think>\n\n答<|im_end|>"]


def test_a_turn_of_the_developer_is_a_system_turn(tokenizers):
    turns = [{"role": role, "content": role} for role in ("developer", "user", "assistant")]
    tokens = encode(tokenizers["tiny"], row_of({"messages": turns}))
    assert tokenizers["tiny"].decode(tokens.ids).startswith("<|im_start|>system\ndeveloper<|im_end|>")


# ---- data.chat_template_kwargs


def test_arguments_are_defaults_that_a_caller_may_change(tokenizers):
    turns = [{"role": "user", "content": "问"}]
    plain = with_template(tokenizers["tiny"], TEMPLATES["thinking"])
    set_up = with_template(tokenizers["tiny"], told(TEMPLATES["thinking"], enable_thinking=False))
    options = {"add_generation_prompt": True, "tokenize": False}
    off, on = (plain.apply_chat_template(turns, enable_thinking=value, **options) for value in (False, True))
    assert off != on == plain.apply_chat_template(turns, **options)
    assert set_up.apply_chat_template(turns, **options) == off
    assert set_up.apply_chat_template(turns, enable_thinking=True, **options) == on
    assert has_default(set_up, "enable_thinking")
    assert not has_default(plain, "enable_thinking")


@pytest.mark.parametrize("value", [True, 3, 0.5, 'a "quoted" \n\\ text 城'])
def test_values_of_all_types_reach_the_template_once(tokenizers, value):
    template = "\n{{ mode }}|{{ messages[0].content }}"
    words = with_template(tokenizers["tiny"], template)
    expected = words.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, mode=value)
    for _ in range(2):  # a run's adapter brings the template that it was trained with
        set_defaults(words, {"mode": value})
    assert words.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False) == expected
    assert words.chat_template.count("set mode") == 1


def test_an_argument_that_the_template_does_not_have_is_refused(tokenizers):
    words = with_template(tokenizers["tiny"], TEMPLATES["thinking"])
    for name in ("preserve_thoughts", "messages"):
        with pytest.raises(
            ValueError, match=rf"no argument {name}; names .* enable_thinking, preserve_thinking"
        ):
            set_defaults(words, {name: True})
    with pytest.raises(ValueError, match="no argument enable_thinking; names"):
        set_defaults(with_template(tokenizers["tiny"], TEMPLATES["coder"]), {"enable_thinking": True})
