"""`qwenlora diff` names what two runs differ in, and nothing else."""

import io
import json
import shutil

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.configs.load import to_yaml
from qwenlora.jobs.views.diff import config, show_diff
from qwenlora.jobs.views.overview import read_overview
from qwenlora.run.folder import RunFolder


@pytest.fixture(scope="module")
def held(tiny_run, tmp_path_factory):
    """Return a copy of a real run, which tests copy and change."""
    folder = tmp_path_factory.mktemp("held") / "one"
    shutil.copytree(
        tiny_run[0], folder, ignore=shutil.ignore_patterns("checkpoint-*", "base_model", "logs", "wandb")
    )
    return folder


@pytest.fixture
def pair(held, tmp_path):
    """Return two runs that differ in nothing but their names."""
    one, other = (RunFolder(shutil.copytree(held, tmp_path / name)) for name in ("one", "other"))
    other.config.write_text(to_yaml(load_config(other.config, ["run_dir=runs/other"])))
    return one, other


def shown(one, other, width=120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    assert show_diff(one.path, other.path, console) == 0
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_two_runs_that_are_alike_say_so_section_by_section(pair):
    assert shown(*pair) == ["config: the same", "code: the same", "data: the same", "results: the same"]


def test_runs_that_differ_in_r_and_data_name_exactly_those(pair):
    one, other = pair
    other.config.write_text(to_yaml(load_config(other.config, ["lora.r=8", "data.train=my.jsonl"])))
    facts = json.loads(other.facts.read_text())
    facts["data"]["train"] |= {"rows": 99, "tokens": 4000, "trained_tokens": 2000, "sha256": "0" * 64}
    other.facts.write_text(json.dumps(facts))
    assert config(read_overview(one), read_overview(other)) == {
        "data.train": ("example", "my.jsonl"),
        "lora.r": ("32", "8"),
    }
    lines = [line.split() for line in shown(one, other)]
    assert lines[:3] == [
        ["config", "one", "other"],
        ["data.train", "example", "my.jsonl"],
        ["lora.r", "32", "8"],
    ]
    assert lines[3] == ["code:", "the", "same"]
    assert [line[:-2] for line in lines[5:-1]] == [
        *(["train", "rows"], ["train", "tokens"], ["train", "trained", "tokens"], ["train", "sha256"])
    ]
    assert lines[5][-2:] == ["120", "99"]
    assert lines[-1] == ["results:", "the", "same"]


def test_other_rows_of_the_same_number_and_other_weights_are_told_by_their_hashes(pair):
    one, other = pair
    facts = json.loads(other.facts.read_text())
    facts["data"]["eval"]["sha256"] = "f" * 64
    other.facts.write_text(json.dumps(facts | {"base_fingerprint": "0123456789abcdef"}))
    text = "\n".join(shown(one, other))
    assert "eval sha256" in text
    assert "base weights" in text
    assert "rows" not in text


def test_code_differs_by_commit_by_changes_and_by_version(pair):
    one, other = pair
    code = json.loads(other.code.read_text())
    code["versions"]["torch"] = "2.99"
    other.code.write_text(json.dumps(code | {"git": "b" * 40, "command": ["something", "else"]}))
    other.diff.write_text("+ a line")
    (one.path / "code.diff").unlink(missing_ok=True)
    found = [line.split()[0] for line in shown(one, other) if line][2:-2]
    assert found == ["git", "changed", "torch"]


def test_results_differ_by_losses_and_by_what_was_compared(pair):
    one, other = pair
    with other.metrics.open("a") as file:
        file.write('{"step": 121, "loss": 0.5}\n{"step": 121, "eval_loss": 7.5, "eval_perplexity": 1808.0}\n')
    measure = {"set": "training", "measure": "exact", "kind": "share", "better": "higher", "count": 120}
    for run, value in ((one, 1.0), (other, 0.975)):
        subjects = [
            {"label": "base", "adapter": None},
            {"label": run.path.name, "adapter": "adapter", "own": True},
        ]
        subjects += [{"label": run.path.name, "adapter": "adapter"}]
        measure["count"] = 120 if run is one else 40
        compared = {
            "subjects": subjects,
            "measures": [measure | {"values": [0.0, value, 0.5]}],
            "answers": [],
        }
        (run.path / "comparison.json").write_text(json.dumps(compared))
    text = "\n".join(shown(one, other))
    assert "7.5" in text
    assert [line.split()[-2:] for line in text.splitlines() if "training: exact" in line] == [
        ["100.0%", "97.5%"]
    ]
    assert [line.split()[-2:] for line in text.splitlines() if "training: questions" in line] == [
        ["120", "40"]
    ]


def test_a_damaged_run_is_compared_as_far_as_it_goes(pair):
    one, other = pair
    other.config.write_text("lora: [")
    other.facts.unlink()
    lines = shown(one, other)
    assert any(line.startswith("other: config.yaml cannot be read") for line in lines)
    assert not any(line.startswith("config") for line in lines)
    assert any(line.split() == ["train", "rows", "120", "-"] for line in lines)


def test_what_is_no_run_or_the_same_run_is_refused(pair, tmp_path):
    one, other = pair
    (one.path / "checkpoint-40").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="checkpoint-40 is part of the run .*one; name the run"):
        shown(RunFolder(one.path / "checkpoint-40"), other)
    with pytest.raises(ValueError, match=r"holds no run: it has no config\.yaml with code\.json; name"):
        shown(one, RunFolder(tmp_path))
    with pytest.raises(ValueError, match="are one run; name two"):
        shown(one, one)


def test_runs_of_the_same_name_are_told_apart_by_their_paths(pair, tmp_path):
    one, other = pair
    (tmp_path / "elsewhere").mkdir()
    moved = RunFolder(other.path.rename(tmp_path / "elsewhere" / "one"))
    (moved.path / "metrics.jsonl").unlink()
    heading = next(line for line in shown(one, moved, width=300) if line.startswith("results "))
    assert str(moved.path) in heading


def test_numbers_are_compared_as_they_are_not_as_they_look(pair):
    one, other = pair
    for run, loss in ((one, 1.23441), (other, 1.23449)):
        with run.metrics.open("a") as file:
            file.write(json.dumps({"step": 121, "loss": loss}) + "\n")
    (line,) = (line for line in shown(one, other) if line.split()[:1] == ["loss"])
    assert line.split() == ["loss", "1.23441", "1.23449"]
