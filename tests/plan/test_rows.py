"""Tokens guessed from texts are near what a Qwen's tokenizer counts."""

import json

import pytest
from run_facts import make_facts
from tokenizers import Tokenizer

from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data
from qwenlora.data.survey import rows_of_side
from qwenlora.plan.rows import guess, rows_of

FILES = ("alpaca_zh_demo.json", "identity.json", "medical_multiturn_messages.jsonl")
SOME = 150


@pytest.mark.parametrize("name", FILES)
def test_guessed_tokens_are_within_a_tenth_of_counted_ones(assets, tmp_path, name):
    tokenizer = Tokenizer.from_file(str(assets / "tokenizers" / "qwen3" / "tokenizer.json"))
    data = Data(train=str(assets / "data" / name), on_bad_row="skip")
    rows = [row.messages for _, row in rows_of_side(data, "train")][:SOME]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows), encoding="utf-8")
    texts = (
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        for turns in rows
    )
    counted = sum(len(tokenizer.encode(text).ids) for text in texts)
    guessed = guess(Data(train=str(file), max_length=100_000))
    assert guessed.tokens == pytest.approx(counted, rel=0.1)
    assert guessed.rows == len(rows)


def test_a_long_row_counts_as_much_as_the_config_lets_it():
    short = guess(Data(train="example", max_length=16))
    assert short.longest == 16
    assert short.tokens <= 16 * short.rows


def test_rows_of_a_prepared_run_are_as_they_were_counted(tmp_path):
    values = {"run_dir": str(tmp_path), "model": {"name_or_path": "tiny"}, "data": {"train": "example"}}
    config = Config.model_validate(values)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "facts.json").write_text(make_facts().text())
    assert rows_of(config)[:4] == (9, 90, 9, 20)
    other = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 512})})
    assert not rows_of(other).counted
    other = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": "another"})})
    assert not rows_of(other).counted


@pytest.mark.parametrize(
    "damage",
    ["{", make_facts(data={}).text(), make_facts().text().replace('"tokens": 90', '"tokens": 0'), None],
)
def test_rows_are_guessed_where_a_prepared_run_s_files_are_damaged(tmp_path, damage):
    config = Config.model_validate(
        {"run_dir": str(tmp_path), "model": {"name_or_path": "tiny"}, "data": {"train": "example"}}
    )
    (tmp_path / "config.yaml").write_text("x: [" if damage is None else to_yaml(config))
    (tmp_path / "facts.json").write_text(damage or make_facts().text())
    assert rows_of(config) == guess(config.data)
