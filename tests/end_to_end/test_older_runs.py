"""A run that version 0.1 made is read, resumed and compared as before (of_0.1/, with how it went on then)."""

import json
import lzma
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwenlora.run import checkpoints
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Code

OLDER = Path(__file__).parent / "of_0.1"


@pytest.fixture
def older(tmp_path) -> RunFolder:
    """Return the run, as 0.1 left it after step 2 of 4."""
    shutil.copytree(OLDER / "old", tmp_path / "runs" / "old")
    tokenizer = lzma.decompress((OLDER / "tokenizer.json.xz").read_bytes())  # kept once, and small
    for folder in ("adapter", "checkpoint-2"):
        (tmp_path / "runs" / "old" / folder / "tokenizer.json").write_bytes(tokenizer)
    shutil.copy(OLDER / "old.yaml", tmp_path)
    return RunFolder(tmp_path / "runs" / "old")


def test_its_records_are_read(older):
    (attempt,) = older.history.attempts()
    assert (attempt.reason, attempt.first_step, attempt.last_step) == ("done", 1, 2)
    assert older.history.last_step() == 2
    assert older.done
    facts = older.read_facts()
    assert (facts.units, facts.data["eval"].rows, facts.parameters.trainable) == (120, 20, 7168)
    assert Code.read(older.code).versions["qwenlora"] == "0.1.0"
    (checkpoint,) = older.checkpoints()
    assert checkpoints.flaw(checkpoint) == ""
    assert checkpoints.read_state(checkpoint).eval_losses.keys() == {2}
    compared = Comparison.read(older.comparison)
    assert compared.subjects[1].own
    assert compared.measures[0].values == [0.0, 0.0]


def test_records_survive_being_written_again(older):
    before = older.history.attempts()
    older.history.note(cause="TIMEOUT")
    assert [attempt.revised(cause=None) for attempt in older.history.attempts()] == before
    facts = older.read_facts()
    older.write_facts(facts)
    assert older.read_facts() == facts
    assert json.loads(older.facts.read_text())["format"] == 1


@pytest.mark.slow
def test_it_goes_on_and_ends_with_the_adapter_that_0_1_ended_with(older, qwenlora):
    # 0.1 padded rows, as they are still with this attention; else dropout would draw other numbers
    padded = "model.attn_implementation=eager"
    answer = qwenlora("train", "old.yaml", padded, "--allow-config-change", "model.attn_implementation")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "resuming from checkpoint-2" in answer.stdout
    expected = load_file(OLDER / "adapter-at-4.safetensors")
    trained = load_file(older.adapter / "adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    # another CPU may round otherwise; one step moves them by 3e-3
    assert all(float((trained[name] - expected[name]).abs().max()) < 1e-5 for name in expected)
    assert [attempt.resumed_from for attempt in older.history.attempts()] == [None, "checkpoint-2"]
    steps = [json.loads(line)["step"] for line in older.metrics.read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    for command in (("status", "runs/old"), ("runs", "runs"), ("report", "runs/old")):
        answer = qwenlora(*command)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "done" in qwenlora("status", "runs/old").stdout
