"""Prepared data is what was read, keyed by all it depends on, and never left half-written under its name."""

import copy
import json
import os

import numpy as np
import pytest

from qwenlora.configs.schema import Data
from qwenlora.data import chat, prepared
from qwenlora.data.rows import read_rows


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "my.jsonl"
    rows = [{"instruction": f"问题{n}", "output": "答" * (n + 1)} for n in range(30)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["tiny"]


def test_rows_come_back_as_they_were_encoded(tmp_path, rows_file, tokenizer):
    facts = prepared.prepare(Data(train=str(rows_file)), tokenizer, tmp_path / "out")
    side = prepared.open_side(tmp_path / "out", "train")
    expected = chat.encode(tokenizer, read_rows([rows_file]))
    assert len(side) == facts["train"]["rows"] == 30
    for number, tokens in enumerate(expected):
        assert np.array_equal(side.row(number).ids, tokens.ids)
        assert np.array_equal(side.row(number).trained, tokens.trained)
    assert side.lengths.tolist() == [len(tokens.ids) for tokens in expected]
    assert side.trained_lengths.tolist() == [tokens.trained.sum() for tokens in expected]
    assert isinstance(side.ids, np.memmap)
    assert prepared.open_side(tmp_path / "out", "eval") is None


def test_a_second_preparation_reads_no_rows(tmp_path, rows_file, tokenizer, monkeypatch):
    first = prepared.prepare(Data(train=str(rows_file)), tokenizer, tmp_path / "out")
    monkeypatch.setattr(prepared.rows, "read_rows", lambda files: pytest.fail("read again"))
    assert prepared.prepare(Data(train=str(rows_file)), tokenizer, tmp_path / "out") == first


def test_a_preparation_that_was_cut_off_is_not_taken_for_whole(tmp_path, rows_file, tokenizer, monkeypatch):
    def cut_off(kept, folder):
        folder.mkdir(parents=True)
        (folder / "ids.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prepared.prepare(Data(train=str(rows_file)), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepared.prepare(Data(train=str(rows_file)), tokenizer, tmp_path / "out")["train"]["rows"] == 30


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path, rows_file, tokenizer, monkeypatch):
    config, out = Data(train=str(rows_file)), tmp_path / "out"
    write = prepared._write

    def meanwhile(kept, folder):
        monkeypatch.setattr(prepared, "_write", write)
        monkeypatch.setattr(prepared.os, "getpid", lambda: -1)
        prepared.prepare(config, tokenizer, out)  # another process, faster
        return write(kept, folder)

    monkeypatch.setattr(prepared, "_write", meanwhile)
    assert prepared.prepare(config, tokenizer, out)["train"]["rows"] == 30
    assert [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []


def test_the_key_changes_with_all_that_the_tokens_depend_on(tmp_path, rows_file, tokenizer):
    config = Data(train=str(rows_file))
    keys = {
        prepared.key_of(config, tokenizer),
        prepared.key_of(config.model_copy(update={"max_length": 64}), tokenizer),
        prepared.key_of(config.model_copy(update={"overlength": "drop"}), tokenizer),
        prepared.key_of(config.model_copy(update={"eval": str(rows_file)}), tokenizer),
    }
    stat = rows_file.stat()
    rows_file.write_bytes(rows_file.read_bytes().replace("问题3".encode(), "问题4".encode()))
    os.utime(rows_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # content counts, not the date
    keys.add(prepared.key_of(config, tokenizer))
    assert len(keys) == 5


def test_the_key_changes_with_the_tokenizer_and_its_template(tokenizers, rows_file):
    keys = {prepared.key_of(Data(train=str(rows_file)), tokenizer) for tokenizer in tokenizers.values()}
    assert len(keys) == len(tokenizers)
    tiny = copy.deepcopy(tokenizers["tiny"])
    tiny.chat_template += " "
    keys.add(prepared.key_of(Data(train=str(rows_file)), tiny))
    assert len(keys) == len(tokenizers) + 1


def test_rows_that_are_too_long_are_refused_unless_told(tmp_path, rows_file, tokenizer):
    message = (
        r"(\d+) of 30 train rows are longer than data\.max_length=30 tokens \(the longest, .*:30, has \d+\); raise"
    )
    with pytest.raises(ValueError, match=message):
        prepared.prepare(Data(train=str(rows_file), max_length=30), tokenizer, tmp_path / "out")


def test_rows_that_are_too_long_are_cut_or_dropped_and_counted(tmp_path, rows_file, tokenizer):
    whole = chat.encode(tokenizer, read_rows([rows_file]))
    long = sum(len(tokens.ids) > 30 for tokens in whole)
    cut = prepared.prepare(Data(train=str(rows_file), max_length=30, overlength="truncate"), tokenizer, tmp_path / "c")
    drop = prepared.prepare(Data(train=str(rows_file), max_length=30, overlength="drop"), tokenizer, tmp_path / "d")
    assert 0 < long < 30
    assert (cut["train"]["truncated"], cut["train"]["rows"], cut["train"]["longest"]) == (long, 30, 30)
    assert (drop["train"]["dropped"], drop["train"]["rows"]) == (long, 30 - long)


def test_truncation_never_leaves_a_row_without_trained_tokens(tmp_path, tokenizer):
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({"instruction": "很长的问题" * 20, "output": "答"}))
    with pytest.raises(ValueError, match=r"my\.jsonl:1: truncated to data\.max_length=30 tokens, nothing of the reply"):
        prepared.prepare(Data(train=str(file), max_length=30, overlength="truncate"), tokenizer, tmp_path / "out")


def test_data_that_never_trains_the_end_of_a_turn_is_refused(tmp_path, tokenizer):
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({"instruction": "问", "output": "很长的答案" * 20}))
    with pytest.raises(ValueError, match=r"no train row trains the end of a turn \(<\|im_end\|>\)"):
        prepared.prepare(Data(train=str(file), max_length=30, overlength="truncate"), tokenizer, tmp_path / "out")
