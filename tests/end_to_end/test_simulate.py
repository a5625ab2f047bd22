"""`train --simulate-world` runs the first and the last of many ranks, and leaves nothing behind."""

import re

import pytest

CONFIG = """
model: {name_or_path: tiny}
data: {train: example, eval: example, max_length: 128}
train: {global_batch_size: 64, per_device_train_batch_size: 1, max_steps: 50, eval_strategy: steps,
        eval_steps: 2, save_strategy: steps, save_steps: 2}
"""


@pytest.mark.slow
def test_the_first_and_the_last_rank_run_three_steps_and_leave_only_prepared_rows(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(CONFIG)
    (tmp_path / "tmp").mkdir()
    command = ("train", "my.yaml", "run_dir=runs/a", "--simulate-world", "64")
    answer = qwenlora(*command, TMPDIR=str(tmp_path / "tmp"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "rank 0 and rank 63 of 64 (64 nodes x 1) ran 3 steps, without the others\n" in answer.stdout
    (tokens,) = re.findall(r"tokens in 3 steps +(\d+) +(\d+)", answer.stdout)
    first, last = map(int, tokens)
    assert first > last > 0  # the longest rows come first, and the last of an epoch are fewer than the ranks
    (uneven,) = re.findall(
        r"slowest / mean: ([\d.]+), .* of all 64 on average, in the coming 50", answer.stdout
    )
    assert float(uneven) >= 1
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [file.name for file in (tmp_path / "runs").iterdir()] == [".prepared"]


@pytest.mark.parametrize(
    ("world", "override", "says"),
    [
        (64, "strategy.name=zero2", "--simulate-world: with strategy.name=zero2 a rank computes with what"),
        (64, "strategy.sequence_parallel=2", "with strategy.sequence_parallel=2 a rank"),
        (65, "launch.nproc_per_node=8", "--simulate-world 65: expected a multiple of a node's 8 processes"),
        (128, "run_dir=a", "fewer than 128 processes; set train.global_batch_size: 128 or more"),
    ],
)
def test_what_cannot_be_simulated_is_refused(qwenlora, tmp_path, world, override, says):
    (tmp_path / "my.yaml").write_text(CONFIG)
    answer = qwenlora("train", "my.yaml", override, "--simulate-world", world)
    assert (answer.returncode, says in answer.stderr) == (2, True)
    assert [file.name for file in tmp_path.iterdir()] == ["my.yaml"]
