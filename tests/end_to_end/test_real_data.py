"""Real rows with the real Qwen tokenizers, on a tiny model built around them: 10 steps, and the loss
falls."""

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("tokenizer", "file"),
    [
        pytest.param("qwen2.5", "medical_qa_sharegpt.jsonl", marks=pytest.mark.long),
        pytest.param("qwen3", "medical_qa_sharegpt.jsonl", marks=pytest.mark.long),
        ("qwen3", "medical_multiturn_messages.jsonl"),
    ],
)
def test_the_loss_falls(qwenlora, tmp_path, assets, tokenizer, file):
    (tmp_path / "my.yaml").write_text(
        f"model: {{name_or_path: tiny, tokenizer: '{assets}/tokenizers/{tokenizer}'}}\n"
        f"data: {{train: '{assets}/data/{file}', max_length: 256, overlength: drop}}\n"
        "lora: {r: 16}\n"
        "train: {global_batch_size: 2, per_device_train_batch_size: 2, max_steps: 10, learning_rate: 3e-3,\n"
        "        save_strategy: 'no'}\n"
    )
    answer = qwenlora("train", "my.yaml", "run_dir=run")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 11.5  # about ln(151,680): nothing is known yet
    assert lines[-1]["step"] == 10
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
