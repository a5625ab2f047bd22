"""The embedded model is built fast, the same each time, and is an ordinary folder."""

import copy
import hashlib
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.data.chat import Encoder
from qwenlora.data.replies import NO_THOUGHT
from qwenlora.data.rows import Row
from qwenlora.trainer.model import tiny as tiny_module
from qwenlora.trainer.model.tiny import build_tiny


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_another_process_with_another_thread_count_builds_the_same_bytes(tiny, tmp_path):
    code = (
        "import sys; from pathlib import Path; from qwenlora.trainer.model.tiny import build_tiny as b;"
        " b(Path(sys.argv[1]))"
    )
    environment = {
        "OMP_NUM_THREADS": "2",
        "RAYON_NUM_THREADS": "2",
        "PYTHONHASHSEED": "7",
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=environment, check=True)
    assert digests(tmp_path / "again") == digests(tiny)


def test_it_is_built_in_under_five_seconds_and_once(tmp_path):
    start = time.perf_counter()
    build_tiny(tmp_path / "model")
    assert time.perf_counter() - start < 5
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    build_tiny(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_plain_transformers_loads_it(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) <= model.config.vocab_size


def test_its_tokenizer_gives_the_same_ids_before_and_after_saving(tiny):
    made, loaded = tiny_module.train_tokenizer(), AutoTokenizer.from_pretrained(tiny)
    text = "<|im_start|>user\n成年人 2 天, it's ①  ok\n\n<|im_end|>\n"
    assert made(text).input_ids == loaded(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def pick(tokenizers, name):
    if name not in tokenizers:
        pytest.skip(f"the {name} tokenizer is not here")
    return tokenizers[name]


OLD = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}]
words = st.text(st.sampled_from("ab 好\n<>{}'\"\\\\"), max_size=9)


def turns(role, **more):
    return st.fixed_dictionaries({"role": st.just(role), "content": words}, optional=more)


def chats(*roles):
    """Return chats that may begin with a system turn and hold turns of these roles."""
    first = st.lists(turns("system"), max_size=1)
    return st.builds(list.__add__, first, st.lists(st.one_of(roles), min_size=1, max_size=7))


@pytest.fixture(scope="module")
def render(tokenizers):
    def render(messages, tools=None, *, by="tiny", template=None, prompt=False):
        return pick(tokenizers, by).apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
        )

    return render


@given(messages=chats(turns("user"), turns("assistant"), turns("system")), prompt=st.booleans())
def test_plain_chats_are_rendered_as_by_the_first_version(render, messages, prompt):
    assert render(messages, prompt=prompt) == render(messages, template=OLD, prompt=prompt)


@given(
    messages=chats(
        turns("user"),
        turns("tool"),
        turns("assistant", reasoning_content=words.filter(str.strip), tool_calls=st.just(CALLS)),
        st.just({"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"}),
    )
)
def test_calls_thoughts_and_answers_of_tools_are_rendered_as_by_qwen3(render, messages):
    assert render(messages) == render(messages, by="qwen3").replace(NO_THOUGHT, "")


def test_earlier_thoughts_are_left_out_and_calls_follow_their_reply(render):
    thinking = {"role": "assistant", "content": "Look.", "reasoning_content": "hm", "tool_calls": CALLS}
    asked, answer = {"role": "user", "content": "?"}, {"role": "tool", "content": "no"}
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
    turn = f"Look.\n{call}<|im_end|>\n"
    heard = "<|im_start|>user\n<tool_response>\nno\n</tool_response><|im_end|>\n"
    begin, question = "<|im_start|>assistant\n", "<|im_start|>user\n?<|im_end|>\n"
    last = f"{question}{begin}<think>\nhm\n</think>\n\n{turn}{heard}"
    assert render([asked, thinking, answer]) == last
    assert render([asked, thinking, answer] * 2) == f"{question}{begin}{turn}{heard}{last}"
    assert render([thinking | {"content": ""}]) == f"{begin}{call}<|im_end|>\n"


def test_tools_are_in_the_system_turn(render):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}]
    text = render(messages, TOOLS)
    system, _, rest = text.partition("<|im_end|>\n")
    assert rest == render(messages[1:])
    assert system.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in system
    assert render(messages[1:], TOOLS) == text.replace("Be kind.\n\n", "")


def test_a_row_with_tools_is_trained_as_with_qwen3(tokenizers):
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    (tokens,) = Encoder(tokenizers["tiny"]).encode([Row(1, messages, tools=TOOLS)])
    text = tokenizers["tiny"].decode(tokens.ids[tokens.trained])
    call = '{"name": "weather", "arguments": {"city": "北京", "days": 2}}'
    assert text == f"<tool_call>\n{call}\n</tool_call><|im_end|>No.<|im_end|>"


CALLED = {"role": "assistant", "content": "", "tool_calls": CALLS}


@pytest.mark.parametrize(
    ("reply", "tools", "left_out"),
    [
        (CALLED, TOOLS, "tools and calls"),
        (CALLED, None, "calls"),
        ({**CALLED, "content": "No."}, None, "calls"),
        ({"role": "assistant", "content": "No."}, TOOLS, "tools"),
    ],
)
def test_a_template_that_leaves_out_tools_or_calls_is_named(tokenizers, reply, tools, left_out):
    tokenizer = copy.deepcopy(tokenizers["tiny"])
    tokenizer.chat_template, tokenizer.name_or_path = OLD, "runs/old/base_model"
    (bad,) = Encoder(tokenizer).encode([Row(1, [{"role": "user", "content": "?"}, reply], tools=tools)])
    assert str(bad).startswith(
        f"has {left_out}, which the chat template of runs/old/base_model leaves out; set model.tokenizer"
    )


def test_it_takes_a_given_tokenizer(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "qwen3")
    build_tiny(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("你好").input_ids == tokenizer("你好").input_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 151680
