"""A folder is read as the datasets library would read it: its split train, or the one that is named."""

import json
import tempfile
from pathlib import Path

import pytest
from datasets.data_files import get_data_patterns, resolve_pattern
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from qwenlora.configs.schema import SourceEntry
from qwenlora.data.folders import files_of


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("d")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def files(folder: Path, notes: list[str] | None = None, **entry: str) -> list[str]:
    """Return the names of the files that an entry of data.train reads."""
    note = (notes if notes is not None else []).append
    found = files_of(folder, SourceEntry(path=str(folder), **entry), "data.train", note)
    return [path.relative_to(folder).as_posix() for path in found]


def refused(folder: Path, **entry: str) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        files(folder, **entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_splits_gives_the_one_that_is_named_else_train(folder):
    fill(folder, "train.jsonl", "validation.jsonl", "test.jsonl", "more.jsonl")
    notes: list[str] = []
    assert files(folder, notes) == ["train.jsonl"]
    assert notes == [
        "d: 1 file is read (split train: train.jsonl), 3 are not (more.jsonl, test.jsonl, validation.jsonl);"
        " name a split or a file to have it read"
    ]
    assert files(folder, split="validation") == ["validation.jsonl"]
    assert files(folder, split="test") == ["test.jsonl"]
    assert refused(folder, split="nonsense") == (
        "data.train=d has no split nonsense, but train, validation, test; name one: data.train: {path: d,"
        " split: ...}"
    )


def test_folders_say_their_split_before_files_do(folder):
    fill(folder, "rows/train/a.jsonl", "rows/train/test.jsonl", "rows/dev-2026/b.jsonl")
    assert files(folder) == ["rows/train/a.jsonl", "rows/train/test.jsonl"]
    assert files(folder, split="validation") == ["rows/dev-2026/b.jsonl"]


def test_shards_say_their_split(folder):
    fill(folder, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    fill(folder, "data/zh.v2-00000-of-00001.parquet", "train.jsonl")
    assert files(folder) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert files(folder, split="zh.v2") == ["data/zh.v2-00000-of-00001.parquet"]


def test_a_folder_of_plain_files_is_read_whole(folder):
    fill(folder, "a.jsonl", "b/c.csv", "trains.jsonl", "train", "latest.jsonl", "prepare_train.py")
    notes: list[str] = []
    assert files(folder, notes) == ["a.jsonl", "b/c.csv", "latest.jsonl", "trains.jsonl"]
    assert notes == ["d: 4 files are read, 2 are not (prepare_train.py, train); name a file to have it read"]
    assert refused(folder, split="test").startswith("data.train=d has no split test, but train; ")


def test_a_folder_of_one_split_that_is_not_train_is_read_when_all_its_files_are_of_it(folder):
    fill(folder, "eval_1.jsonl", "eval_2.jsonl")
    assert files(folder) == files(folder, split="test") == ["eval_1.jsonl", "eval_2.jsonl"]
    fill(folder, "chats.jsonl")  # and now nothing says what is meant
    assert refused(folder).startswith("data.train=d has no split train, but test; name one: ")


CARD = """---
license: mit
configs:
- config_name: zh
  data_files:
  - split: train
    path: zh/*.jsonl
  - split: dev
    path: [held/a.jsonl, "held/**/b.jsonl", none.jsonl]
  - split: later
    path: later/*
- config_name: en
  default: true
  data_files: en.jsonl
- config_name: rest
  data_dir: others
---
# Chats
"""


def test_the_configurations_of_a_readme_decide(folder):
    fill(folder, "zh/1.jsonl", "zh/2.jsonl", "held/a.jsonl", "held/x/y/b.jsonl", "en.jsonl", "train.jsonl")
    fill(folder, "others/train.jsonl", "others/test.jsonl")
    (folder / "README.md").write_text(CARD)
    assert files(folder) == ["en.jsonl"]
    assert files(folder, name="zh") == ["zh/1.jsonl", "zh/2.jsonl"]
    assert files(folder, name="zh", split="dev") == ["held/a.jsonl", "held/x/y/b.jsonl"]
    assert files(folder, name="rest", split="test") == ["others/test.jsonl"]
    assert refused(folder, name="zh", split="test").startswith(
        "data.train=d has no split test, but train, dev, later; "
    )
    assert refused(folder, name="zh", split="later") == (
        "data.train=d: no file is there that its README.md names for the split later"
    )
    assert refused(folder, name="fr") == (
        "data.train=d has no configuration fr, but zh, en, rest; name one: data.train: {path: d, name: ...}"
    )
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    assert refused(folder) == (
        "data.train=d has several configurations: zh, en, rest; name one: data.train: {path: d, name: zh}"
    )


def test_a_configuration_without_a_readme_that_lists_any_is_refused(folder):
    fill(folder, "a.jsonl", "README.md")
    assert refused(folder, name="zh") == (
        "data.train=d: name=zh is not used, since the folder has no README.md that lists configurations"
        " (configs:); remove it"
    )


def test_a_readme_that_is_damaged_is_named(folder):
    fill(folder, "a.jsonl")
    (folder / "README.md").write_text("---\nlicense: mit\nconfigs:\n- data_files: a.jsonl\n---\n")
    assert refused(folder).startswith("d/README.md: configs.0.config_name is not as the hub has it (")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: [\n---\n")
    assert refused(folder).startswith("d/README.md:3: ")


WORDS = ("train", "training", "valid", "dev", "val", "validation", "test", "eval", "evaluation", "testing")
PARTS = st.sampled_from((*WORDS, "a", "data", "x", "trainer", "my", "0", "TRAIN"))
NAMES = st.lists(st.tuples(PARTS, st.sampled_from("-._ 0+")), min_size=1, max_size=3).map(
    lambda pairs: "".join(f"{part}{mark}" for part, mark in pairs)[:-1]
)
PATHS = st.tuples(st.lists(NAMES, max_size=2), NAMES).map(
    lambda pair: "/".join([*pair[0], pair[1] + ".jsonl"])
)


@settings(max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(st.sets(PATHS, min_size=1, max_size=5))
@example({"data/train-00000-of-00001.jsonl", "data/x-00000-of-00001.jsonl", "test.jsonl"})
@example({"train_test.jsonl", "eval.jsonl", "x.jsonl"})
def test_names_give_the_splits_that_the_library_finds(paths):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        theirs: dict[str, set[str]] = {}
        for split, patterns in get_data_patterns(name).items():
            for pattern in patterns:
                try:
                    found = resolve_pattern(pattern, base_path=name)
                except FileNotFoundError:
                    continue
                theirs.setdefault(str(split), set()).update(found)
        for split, found in theirs.items():
            assert {str(folder / path) for path in files(folder, split=split)} == found
        with pytest.raises(ValueError, match=r"has no split none, but ") as caught:
            files(folder, split="none")
        listed = str(caught.value).split("but ")[1].split(";")[0]
        assert listed.split(", ") == list(theirs)
