"""What data.train and data.eval name is found: files, folders, globs, lists, saved data sets; what is not, is
said."""

import json
import os
from pathlib import Path

import datasets
import pytest

from qwenlora.configs.schema import Data
from qwenlora.data import sources
from qwenlora.data.survey import rows_of_side, survey

ROW = {"instruction": "几点？", "output": "三点。"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *answers: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"instruction": "q", "output": answer}) + "\n" for answer in answers))
    return name


def answers(**data) -> list[str]:
    """Return the answers that the config's rows train, in order."""
    return [row.messages[-1]["content"] for _, row in rows_of_side(Data(**data), "train")]


def refused(**data) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        survey(Data(**data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_its_data_files_in_order_of_their_names():
    for name in (
        "d/b.jsonl",
        "d/a.json",
        "d/deep/er/c.JSONL",
        "d/README.md",
        "d/.git/x.jsonl",
        "d/dataset_info.json",
    ):
        write(name, name)
    notes: list[str] = []
    (found,) = sources.find(Data(train="d"), notes.append)
    assert found.files == [Path("d/a.json"), Path("d/b.jsonl"), Path("d/deep/er/c.JSONL")]
    assert notes == [
        "d: 3 files are read, 2 are not (README.md, dataset_info.json); name a file to have it read"
    ]
    assert answers(train="d") == ["d/a.json", "d/b.jsonl", "d/deep/er/c.JSONL"]


def test_a_glob_is_the_files_that_match_in_order():
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deep/c.jsonl", "d/a.txt"):
        write(name, name)
    assert answers(train="d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert answers(train="d/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/deep/c.jsonl"]
    assert answers(train="d/[b].*") == ["d/b.jsonl"]
    assert answers(train=f"{Path.cwd()}/d/?.txt") == ["d/a.txt"]


def test_a_file_that_is_called_like_a_glob_is_that_file():
    assert answers(train=write("a[1].jsonl", "x")) == ["x"]


def test_a_home_folder_may_be_written_short(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write("my.jsonl", "x")
    assert answers(train="~/my.jsonl") == ["x"]


def test_several_sources_are_read_in_the_order_they_are_named():
    listed = [write("b.jsonl", "1", "2"), {"path": write("d/a.jsonl", "3")}, "d", write("c.jsonl", "4")]
    assert answers(train=listed) == ["1", "2", "3", "3", "4"]
    found = sources.find(Data(train=listed, eval=[write("e.jsonl", "5")]))
    assert [(source.name, source.side) for source in found] == [
        ("b.jsonl", "train"),
        ("d/a.jsonl", "train"),
        ("d", "train"),
        ("c.jsonl", "train"),
        ("e.jsonl", "eval"),
    ]
    assert found[2].place(0, 7) == "d/a.jsonl:7"


def test_a_weight_counts_in_an_epoch():
    a, b = write("a.jsonl", *"12345678"), write("b.jsonl", "x")
    assert survey(Data(train=[{"path": a, "weight": 2.0}, b, {"path": b, "weight": 0.5}])).train in (17, 18)


def test_a_weight_of_eval_is_refused():
    message = refused(train="example", eval={"path": write("a.jsonl", "x"), "weight": 2.0})
    assert message == "data.eval: a.jsonl has weight 2.0; evaluation sees every row once"


def test_options_of_a_source_come_before_those_of_data(folder):
    (folder / "a.jsonl").write_text('{"q": "x", "a": "1"}')
    (folder / "b.jsonl").write_text('{"frage": "x", "antwort": "2"}')
    (folder / "c.csv").write_bytes("frage,antwort\nx,三\n".encode("big5"))
    (folder / "d.jsonl").write_text(
        '{"messages": [{"role": "x", "content": "q"}, {"role": "gpt", "content": "4"}]}'
    )
    (folder / "e.jsonl").write_text('{"messages": "[", "query": "q", "response": "5"}')
    assert answers(
        train=[
            {"path": "a.jsonl", "columns": {"q": "instruction", "a": "output"}},
            "b.jsonl",
            {"path": "c.csv", "encoding": "big5"},
            {"path": "d.jsonl", "roles": {"x": "user"}, "format": "auto"},
            {"path": "e.jsonl", "format": "query_response"},
        ],
        columns={"frage": "instruction", "antwort": "output"},
        roles={"x": "system"},
    ) == ["1", "2", "三", "4", "5"]


def test_a_column_that_is_none_is_refused_before_rows_are_read():
    assert refused(train="example", columns={"a": "outptu"}).startswith(
        "data.columns: {a: outptu}: rows have no outptu here; known: instruction, output, "
    )
    assert refused(train="example", columns={"prompt": "frage"}) == (
        "data.columns: {prompt: frage}: the rows' own key stands first; write {frage: prompt}"
    )


def test_each_file_has_a_shape_of_its_own(folder):
    (folder / "d").mkdir()
    (folder / "d" / "a.jsonl").write_text('{"query": "q", "response": "1"}')
    (folder / "d" / "b.csv").write_text("prompt,completion\nq,2\n")
    (folder / "d" / "c.json").write_text('[{"instruction": "q", "output": "3"}]')
    assert answers(train="d") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("path", "what", "keys"),
    [
        ("a.jsonl", "a file", ["split", "name", "revision"]),
        ("*.jsonl", "a glob", ["split", "name", "revision"]),
        ("d", "a folder", ["revision"]),
        ("example", "rows that come with qwenlora", ["split", "name", "revision", "encoding"]),
        ("org/chats", "a data set of the hub", ["encoding"]),
        ("splits", "a data set of save_to_disk", ["name", "revision", "encoding"]),
    ],
)
def test_a_key_that_is_not_used_is_refused(saved, path, what, keys):
    for name in ("a.jsonl", "d/a.jsonl"):
        write(name, "x")
    for key in keys:
        assert refused(train={"path": path, key: "x"}) == (
            f"data.train: {{path: {path}, {key}: x}}: {path} is {what}, for which {key} is not used; remove"
            " it"
        )


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing-v1.5"])
def test_a_hub_name_that_cannot_be_loaded_is_refused_in_one_line(name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = refused(train=name)
    assert message.startswith(
        f"data.train={name}: no such file, and no data set of the hub that can be loaded (offline:"
        " HF_HUB_OFFLINE is set): "
    )


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "_from_hub", lambda *_: pytest.fail("the hub was asked"))
    for name in ("data/my.jsonl", "./x", "../x", "a/b/c", "~/x", "/x", "data/my.csv.gz"):
        assert refused(train=name).startswith(f"data.train={name}: no such file (looked for /")


@pytest.fixture
def saved(folder) -> datasets.Dataset:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(n)}]}
        for n in range(5)
    ]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([4])).save_to_disk(folder / "splits")
    return dataset


def test_a_folder_of_save_to_disk_is_its_data_set(saved):
    assert answers(train="saved") == list("01234")
    (found,) = sources.find(Data(train="saved"))
    assert [path.suffix for path in found.files] == [".arrow"]
    assert found.place(0, 3) == "saved:3"


def test_a_saved_data_set_of_several_splits_gives_the_one_that_is_named(saved):
    assert answers(train="splits") == list("01234")
    assert answers(train={"path": "splits", "split": "test"}) == ["4"]
    assert refused(train={"path": "splits", "split": "dev"}) == (
        "data.train=splits has no split dev, but train, test; name one: data.train: {path: splits, split:"
        " ...}"
    )


def test_a_saved_data_set_without_splits_refuses_one(saved):
    assert refused(train={"path": "saved", "split": "dev"}) == (
        "data.train=saved has no splits: it is one data set; remove split: dev"
    )


def test_a_saved_data_set_that_is_damaged_is_refused_in_one_line(saved, folder):
    (folder / "saved" / "data-00000-of-00001.arrow").write_bytes(b"x")
    assert refused(train="saved").startswith(
        "data.train=saved: this data set of save_to_disk cannot be loaded: "
    )


def test_a_hub_data_set_is_read_like_a_file(saved, monkeypatch):
    asked = []

    def load_dataset(path, name, **options):  # the hub itself is out of reach
        asked.append((path, name, options))
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train = {"path": "org/chats", "name": "zh", "split": "train[:5]", "revision": "v2"}
    assert answers(train=train) == list("01234")
    assert asked == [("org/chats", "zh", {"split": "train[:5]", "revision": "v2"})]
    ((place, _), *_) = rows_of_side(Data(train=train), "train")
    assert place == "org/chats:1"


def test_the_dataset_info_of_llama_factory_is_no_rows_and_describes_a_file_beside_it():
    info = {"faq": {"file_name": "faq.jsonl", "columns": {"prompt": "frage", "response": "output"}}}
    Path("dataset_info.json").write_text(json.dumps(info))
    Path("faq.jsonl").write_text('{"frage": "?", "output": "!"}\n')
    notes: list[str] = []
    sources.find(
        Data(train=["faq.jsonl", {"path": "faq.jsonl", "columns": {"frage": "query"}}]), notes.append
    )
    assert notes == [
        "faq.jsonl: LLaMA-Factory's dataset_info.json beside it describes it; to have it read so: data.train:"
        ' {"path": "faq.jsonl", "columns": {"input": null, "frage": "instruction"}}'
    ]
    assert refused(train="dataset_info.json") == (
        "data.train=dataset_info.json is LLaMA-Factory's dataset_info.json: it has no rows, but names their"
        " files; write a config from it: qwenlora config from dataset_info.json > my.yaml"
    )
