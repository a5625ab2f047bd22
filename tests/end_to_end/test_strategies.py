"""The real command: a run that was stopped under one strategy goes on under another; what cannot work is
refused."""

import json
import os
import sys

import forked
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CONFIG = """
model: {name_or_path: tiny}
data: {train: example, eval: example}
train: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 12, learning_rate: 3e-4,
        adam_epsilon: 1e-6, lr_scheduler_type: constant, warmup_steps: 0, eval_strategy: steps, eval_steps: 6,
        save_strategy: steps, save_steps: 3}
log: {logging_steps: 1, wandb: off}
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(CONFIG)
    return file


def train(config, *arguments: str) -> str:
    command = [*forked.COMMAND, "train", str(config), *arguments]
    done = forked.run(command, cwd=config.parent, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def history(run) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_goes_from_zero3_to_fsdp_to_zero2_and_ends_as_one_that_was_left_alone(config, tmp_path):
    train(config, "run_dir=alone", "--nproc", "2")
    output = train(config, "run_dir=moved", "strategy.name=zero3", "--nproc", "2", "train.max_steps=5")
    assert "2 x CPU, zero3" in output
    assert json.loads((tmp_path / "moved" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    train(config, "run_dir=moved", "strategy.name=fsdp", "--nproc", "1", "train.max_steps=8")
    assert not (tmp_path / "moved" / "deepspeed.json").exists()
    output = train(config, "run_dir=moved", "strategy.name=zero2", "--nproc", "2")
    assert "resuming from checkpoint-8" in output
    alone, moved = history(tmp_path / "alone"), history(tmp_path / "moved")
    assert alone.keys() == moved.keys() == set(range(1, 13))
    assert max(abs(alone[step] - moved[step]) for step in alone) < 1e-5
    files = [
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("alone", "moved")
    ]
    assert max((files[0][key] - files[1][key]).abs().max() for key in files[0]) < 1e-5
    attempts = [json.loads(line) for line in (tmp_path / "moved" / "attempts.jsonl").read_text().splitlines()]
    assert [one["strategy"] for one in attempts] == ["zero3", "fsdp", "zero2"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.optim=adafactor", "strategy.name=zero1 with train.optim=adafactor: "),
        ("strategy.offload=params", "strategy.name=zero1 with strategy.offload=params: "),
    ],
)
def test_ranks_that_are_started_by_hand_are_refused_too(config, override, says):
    argv = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "qwenlora.trainer.main",
        str(config),
    ]
    done = forked.run(
        [sys.executable, "-m", *argv, "run_dir=by-hand", "strategy.name=zero1", override],
        cwd=config.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode != 0
    output = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(output) == 1
    assert output[0].startswith(f"error: {says}")
