"""`qwenlora init` writes configs that load, fit and say why; `recipes` lists and copies what comes along."""

import json
import re

import pytest

from qwenlora.configs.load import load_config
from qwenlora.data.survey import survey
from qwenlora.plan.first_config import Wish, first_config
from qwenlora.plan.hardware import named

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 200}
ROWS = {
    "chat": {"messages": [ASK, ANSWER]},
    "thinking": {"messages": [ASK, {"role": "assistant", "content": "<think>c</think>b"}]},
    "tools": {
        "messages": [ASK, ANSWER],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "pretrain": {"text": "word " * 3000},
}


def made(tmp_path, task="chat", rows=300, wanted=None, **wish):
    file = tmp_path / "my rows.jsonl"
    file.write_text("".join(json.dumps(ROWS[task]) + "\n" for _ in range(rows)))
    settings = {"name": "my", "model": "tiny", "data": str(file), "task": wanted, "gpu": None, "gpus": 1}
    config = tmp_path / "my.yaml"
    config.write_text(first_config(Wish(**settings | wish)))
    return load_config(config), config.read_text()


@pytest.mark.parametrize("task", ROWS)
def test_the_rows_say_what_they_are_for(tmp_path, task):
    config, text = made(tmp_path, task)
    assert f"# tiny, {task}: made by" in text
    assert config.data.overlength == {"pretrain": "split", "chat": "truncate"}.get(task, "drop")
    assert config.data.max_length == {"pretrain": 4096}.get(task, 256)


@pytest.mark.parametrize(
    ("row", "guessed"),
    [
        ({"问题": "a", "答案": "b"}, "columns: {问题: instruction, 答案: output}"),
        (
            {"question": "a", "context": "c", "answer": "b"},
            "columns: {context: input, question: instruction, answer: output}",
        ),
        (
            {"messages": [ASK | {"role": "Gast"}, ANSWER | {"role": "bot"}]},
            "roles: {Gast: user, bot: assistant}",
        ),
        (
            {"system_prompt": "s", "input": "a", "target": "b"},
            "columns: {system_prompt: system, input: instruction, target: output}",
        ),
        ({"answer": "b", "said": "a"}, "columns: {said: instruction, answer: output}"),
        ({"log": [{"who": "user", "text": "a"}, {"who": "Chef", "text": "b"}]}, "roles: {Chef: assistant}"),
    ],
)
def test_other_names_of_keys_and_roles_are_guessed_and_said(tmp_path, row, guessed):
    file = tmp_path / "my rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    text = first_config(Wish("my", "tiny", str(file), None, None, 1))
    (tmp_path / "my.yaml").write_text(text)
    survey(load_config(tmp_path / "my.yaml").data)
    assert re.search(rf"  {re.escape(guessed)} +# guessed: ", text)


def test_few_rows_are_not_packed_on_a_gpu_either(tmp_path):
    few, _ = made(tmp_path, rows=30, gpu=named("h100"))
    many, _ = made(tmp_path, rows=3000, gpu=named("h100"))
    assert (few.data.packing, many.data.packing) == ("off", "auto")
    assert few.train.global_batch_size == 4


def test_rows_that_none_can_train_are_refused_with_the_reason(tmp_path):
    file = tmp_path / "my.jsonl"
    for row, reason in (
        ({"instruction": "a", "output": 3}, "found 3"),
        ({"data": [{"q": "a", "a": "b"}]}, "jq"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=reason):
            first_config(Wish("my", "tiny", str(file), None, None, 1))


def test_few_rows_make_a_small_batch_and_none_is_kept_back(tmp_path):
    few, _ = made(tmp_path, rows=30)
    many, _ = made(tmp_path, rows=3000)
    assert (few.train.global_batch_size, few.data.eval_fraction) == (4, None)
    assert (many.train.global_batch_size, many.data.eval_fraction) == (16, 0.02)


@pytest.mark.parametrize(
    ("base", "gpu", "gpus", "strategy", "quantization"),
    [
        ("Qwen/Qwen3-8B", "h100", 1, "auto", "none"),
        ("Qwen/Qwen2.5-14B", "4090", 1, "auto", "nf4"),
        ("Qwen/Qwen2.5-72B", "h100", 8, "fsdp", "none"),
    ],
)
def test_it_fits_the_gpus_with_what_is_needed_and_no_more(tmp_path, base, gpu, gpus, strategy, quantization):
    config, text = made(tmp_path, model=base, gpu=named(gpu), gpus=gpus)
    assert (config.strategy.name, config.strategy.quantization) == (strategy, quantization)
    assert config.train.global_batch_size % (gpus * config.train.per_device_train_batch_size) == 0
    assert f"# Planned on {gpus} " in text


def test_what_cannot_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not fit 1 T4 of 16\.1 GB, even in 4 bits"):
        made(tmp_path, model="Qwen/Qwen2.5-72B", gpu=named("t4"))


def test_the_commands_write_one_file_and_none_over_another(qwenlora, tmp_path):
    said = qwenlora("init", "demo")
    assert said.returncode == 0
    assert "qwenlora train demo.yaml" in said.stdout
    assert load_config(tmp_path / "demo.yaml").model.name_or_path == "tiny"
    assert "qwenlora train demo.yaml\n" in (tmp_path / "demo.yaml").read_text()
    again = qwenlora("init", "demo")
    assert again.returncode == 2
    assert again.stderr == "error: demo.yaml exists already; choose another name: qwenlora init NAME\n"
    assert qwenlora("recipes", "tiny", "mine.yaml").returncode == 0
    assert "configs/" not in (tmp_path / "mine.yaml").read_text(), "its command names the copy"
    assert qwenlora("recipes", "tinny").stderr == "error: there is no recipe tinny; did you mean tiny?\n"
    assert "qwen2.5-7b-lora-8gpu" in qwenlora("recipes").stdout
