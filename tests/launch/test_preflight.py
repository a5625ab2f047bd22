"""What nodes must have in common."""

import pytest
from run_facts import make_facts

from qwenlora.configs import load_config
from qwenlora.launch import preflight
from qwenlora.launch.messages import NodeFacts
from qwenlora.run.folder import RunFolder

MINE = NodeFacts(
    config="c",
    code="d",
    python="3.11.7",
    versions={"torch": "2.13.0", "peft": "0.21.2"},
    processes=8,
    time=1.0,
)


@pytest.mark.parametrize(
    ("theirs", "problem"),
    [
        ({}, None),
        ({"time": 9.0}, None),
        (
            {"versions": {"torch": "2.12.0", "peft": "0.21.2"}},
            "b has other package versions: torch 2.12.0 (elsewhere 2.13.0)",
        ),
        ({"versions": {"torch": "2.13.0"}}, "b has other package versions: peft None (elsewhere 0.21.2)"),
        ({"python": "3.12.1"}, "b has other package versions: Python 3.12.1 (elsewhere 3.11.7)"),
        ({"code": "e"}, "b has another qwenlora of the same version"),
        ({"config": "x"}, "b reads another config"),
        ({"processes": 4}, "b would run 4 processes, the first node 8"),
    ],
)
def test_a_node_that_differs_is_named(theirs, problem):
    differences = preflight.differences(MINE, {"a": MINE, "b": MINE.model_copy(update=theirs)})
    assert len(differences) == (problem is not None)
    if problem:
        assert differences[0].startswith(problem)


def run_of(tmp_path, checkpoint_bytes):
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "my.yaml"
    file.write_text("model: {name_or_path: tiny}\ndata: {train: example}\n")
    config = load_config(file, {"run_dir": str(tmp_path / "run")})
    run = RunFolder(config.run_dir)
    run.path.mkdir()
    run.write_facts(make_facts(checkpoint_bytes=checkpoint_bytes))
    return config, run


def test_a_file_that_is_shown_is_seen_and_cleared(tmp_path):
    _, run = run_of(tmp_path, 1)
    text = preflight.write_file(run, 1)
    assert preflight.sees_file(run, 1, text)
    preflight.remove_files(run, 2)
    assert {path.name for path in run.path.iterdir()} == {"facts.json"}


def test_another_file_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_WITHIN_S", 0.2)
    _, run = run_of(tmp_path, 1)
    preflight.write_file(run, 1)
    assert not preflight.sees_file(run, 1, "something else")
    assert not preflight.sees_file(run, 2, "")


def test_room_for_the_checkpoints_to_come(tmp_path):
    config, run = run_of(tmp_path, 1000)
    assert preflight.space_warning(config, run) == ""
    config, run = run_of(tmp_path / "full", 2**60)
    assert "MiB free, the 4 checkpoints to come need" in preflight.space_warning(config, run)
    (run.path / "checkpoint-3").mkdir()
    assert "the 3 checkpoints to come need" in preflight.space_warning(config, run)


def test_a_disk_that_can_take_few_more_files_is_a_warning(tmp_path, monkeypatch):
    config, run = run_of(tmp_path, 1000)
    for files, warns in ((0, False), (63, True), (64, False)):  # 0: the file system has no limit
        monkeypatch.setattr(preflight, "free_files", lambda folder, files=files: files)
        warning = preflight.space_warning(config, run)
        assert warning == (
            f"run_dir={run.path} has room for only {files} more files (inodes), the checkpoints to"
            " come need more" * warns
        )
