"""What was trained to end a reply ends it for servers: in the adapter's files, whatever the base says."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.configs.schema import Data
from qwenlora.data import prepared
from qwenlora.trainer.final_adapter import constant_files
from qwenlora.trainer.model.endings import (
    generation_settings,
    is_text_only,
    set_end,
    set_model_end,
)

TURN_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def tokenizer(tiny):
    """Return the tokenizer of a base that is not -Instruct."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def base_that_ends(folder, tokenizer, generation, config):
    """Write a base's files; generation, config: their ends by name, or None without."""
    ids = tokenizer.get_vocab()

    def said(ends):
        return (
            {}
            if ends is None
            else {"eos_token_id": [ids[e] for e in ends] if len(ends) > 1 else ids[ends[0]]}
        )

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"} | said(config)))
    if generation != "no file":
        kept = {"temperature": 0.6, "_from_model_config": True}
        (folder / "generation_config.json").write_text(json.dumps(kept | said(generation)))
    return str(folder)


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ([END_OF_TEXT], [END_OF_TEXT]),  # Qwen3-Base, Qwen2.5
        ([TURN_END, END_OF_TEXT], [TURN_END]),  # -Instruct
        (None, [END_OF_TEXT]),
        ("no file", [END_OF_TEXT]),
        ("no file", None),
    ],
)
def test_a_turns_end_comes_first_and_a_texts_end_stays(tokenizer, tmp_path, generation, config):
    base = base_that_ends(tmp_path, tokenizer, generation, config)
    ids = tokenizer.get_vocab()
    chat = generation_settings(base, None, tokenizer, text_only=False)
    assert chat["eos_token_id"] == [ids[TURN_END], ids[END_OF_TEXT]]
    assert "_from_model_config" not in chat
    assert chat.get("temperature") == (None if generation == "no file" else 0.6)
    assert not is_text_only(chat, tokenizer)
    text = generation_settings(base, None, tokenizer, text_only=True)
    assert text["eos_token_id"][0] == ids[END_OF_TEXT]
    assert (ids[TURN_END] in text["eos_token_id"]) == (generation == [TURN_END, END_OF_TEXT])
    assert is_text_only(text, tokenizer)


def test_a_broken_file_is_named(tokenizer, tmp_path):
    base = base_that_ends(tmp_path, tokenizer, [END_OF_TEXT], None)
    (tmp_path / "generation_config.json").write_text("<html>")
    with pytest.raises(
        ValueError, match=r"generation_config\.json cannot be read: .*; copy or download it again"
    ):
        generation_settings(base, None, tokenizer, text_only=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 1}, {"eos_token_id": 7}),
        ({}, {"eos_token_id": 7}),
        ({"text_config": {"eos_token_id": 1}}, {"text_config": {"eos_token_id": 7}}),
    ],
)
def test_a_models_config_names_the_tokenizers_end_where_it_has_one(config, expected):
    class Words:
        eos_token_id = 7

    set_model_end(config, Words())
    assert config == expected


@pytest.mark.parametrize("text_only", [False, True])
def test_each_checkpoint_and_the_adapter_say_it(tiny, tokenizer, tmp_path, text_only):
    base = base_that_ends(tmp_path, tokenizer, [END_OF_TEXT], [END_OF_TEXT])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj"]))
    set_end(tokenizer, text_only=text_only)
    generation = generation_settings(base, None, tokenizer, text_only=text_only)
    files = constant_files(model, tokenizer, generation)
    end = END_OF_TEXT if text_only else TURN_END
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == end
    assert json.loads(files["generation_config.json"])["eos_token_id"][0] == tokenizer.get_vocab()[end]


@pytest.mark.parametrize(
    ("rows", "trained"),
    [
        (['{"text": "one"}', '{"text": "two"}'], None),
        (['{"text": "one"}', '{"query": "a", "response": "b"}'], True),
    ],
)
def test_rows_of_text_train_no_turns(tokenizer, tmp_path, rows, trained):
    files = []
    for number, row in enumerate(rows):  # a file has rows of one shape
        files.append(str(tmp_path / f"{number}.jsonl"))
        (tmp_path / f"{number}.jsonl").write_text(row + "\n")
    made = prepared.prepare(Data(train=files, num_proc=1), tokenizer, tmp_path / "cache")
    made.refuse(Data(train=files), tokenizer, len(tokenizer))
    assert made.trains_turns(tokenizer) is trained
