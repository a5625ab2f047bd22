"""metrics.jsonl holds whole lines, and no step twice."""

import json
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.trainer.record.metrics import MetricsFile


@pytest.fixture
def file(tmp_path):
    warned = []
    made = MetricsFile(tmp_path / "metrics.jsonl", warned.append)
    made.warned = warned
    return made


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.path.read_text().splitlines()]


@given(
    records=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200), st.booleans()), max_size=40),
    step=st.integers(0, 60),
    torn=st.integers(0, 20),
    block=st.sampled_from([1, 7, 64, 2**16]),
    again=st.booleans(),
)
def test_lines_past_a_step_are_forgotten_and_no_other(tmp_path_factory, records, step, torn, block, again):
    from qwenlora.trainer.record import metrics

    lines, now = [], 0
    for add, size, evaluation in records:
        now += add
        lines.append({"step": now, "x": "é" * size, **({"eval_loss": 1.0} if evaluation else {})})
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    half = '{"step": 1000000000}\n'[:torn] if torn < 20 else ""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + half)
    before, metrics._BLOCK = metrics._BLOCK, block
    try:
        MetricsFile(path).forget_after(step, evaluation_too=again)
    finally:
        metrics._BLOCK = before
    kept = [line for line in lines if line["step"] <= step]
    while again and kept and kept[-1]["step"] == step and "eval_loss" in kept[-1]:
        kept.pop()
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_lines_that_the_disk_does_not_take_come_with_a_later_one(file):
    file.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 5, limits[1]))
    try:
        file.append({"step": 2, "loss": 1.0})
        file.append({"step": 3, "loss": 1.0})
        assert steps(file) == [1], "no half line either"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.append({"step": 4})
    assert steps(file) == [1, 2, 3, 4]
    assert len(file.warned) == 1
    assert "metrics.jsonl cannot be written (" in file.warned[0]


def test_without_a_file_there_is_nothing_to_forget(file):
    file.forget_after(3)
    assert not file.path.exists()
