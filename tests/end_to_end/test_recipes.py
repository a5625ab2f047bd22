"""Recipes of each task, on a tiny base and a few rows of their kind: each reaches the loss of rows that were
learnt."""

import json

import pytest

from qwenlora.configs.recipes import recipes

pytestmark = pytest.mark.slow
FILES = {recipe.name: recipe.file for recipe in recipes()}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SMALL = (
    *("model.name_or_path=tiny", "data.train=my.jsonl", "data.eval_fraction=null", "data.max_length=256"),
    *("train.global_batch_size=6", "train.per_device_train_batch_size=6", "log.logging_steps=5"),
    *("train.save_strategy=no", "train.save_steps=null", "launch.nproc_per_node=1", "run_dir=run"),
)


def chat(question, answer, **keys):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", **answer}], **keys}


def call(city):
    return {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": city}}}]}


ROWS = {
    "qwen3-8b-tools": lambda city: chat(f"{city}天气？", call(city), tools=[TOOL]),
    "qwen3-4b-thinking": lambda city: chat(city, {"content": f"<think>问{city}。</think>{city}很好。"}),
    "qwen2.5-7b-pretrain": lambda city: {"text": f"{city}是一座城市，{city}有很多人。"},
    "customer-service-qlora": lambda city: {"instruction": f"发往{city}？", "output": f"{city}要三天。"},
}
# name, learning rate (high, as the base is random), steps, loss. One token in eight of a text is its end,
# which is also the padding: the tiny model has no embedding for that, so its loss stays at 12
ENDS = [
    ("qwen3-8b-tools", 3e-3, 25, 0.2),
    pytest.param("qwen3-4b-thinking", 3e-3, 25, 0.2, marks=pytest.mark.long),
    pytest.param("qwen2.5-7b-pretrain", 1e-3, 25, 1.8, marks=pytest.mark.long),
    pytest.param("customer-service-qlora", 3e-3, 40, 0.5, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "rate", "steps", "loss"), ENDS)
def test_a_recipe_learns_its_rows(qwenlora, tmp_path, assets, name, rate, steps, loss):
    rows = [ROWS[name](city) for city in ("北京", "上海", "广州", "成都", "西安", "武汉")]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    length = (f"train.learning_rate={rate}", f"train.max_steps={steps}")
    words = f"model.tokenizer={assets}/tokenizers/qwen3"
    answer = qwenlora("train", FILES[name], *SMALL, words, *length)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 5
    assert losses[-1] < loss
