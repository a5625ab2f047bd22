"""Rows are tokenised once, the same however many processes do it; what should not be trained is refused."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from qwenlora.configs.schema import Data, SourceEntry
from qwenlora.data import arrays, build, cache, prepared
from qwenlora.data.chat import Encoder
from qwenlora.data.counts import Overlap
from qwenlora.data.prepared import files_key, key_of, open_side, prepare
from qwenlora.data.sources import find
from qwenlora.data.survey import survey
from qwenlora.data.tokenise import read_rows
from qwenlora.run import package


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def rows_of(count: int, words: int = 1) -> list[dict]:
    return [{"instruction": f"问题{n}" + "很" * (n * words), "output": f"答案{n}。"} for n in range(count)]


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["tiny"]


@pytest.fixture
def rows_file(tmp_path):
    return write(tmp_path / "my.jsonl", rows_of(30))


@pytest.fixture
def make(tmp_path, tokenizer):
    """Return what prepare makes of a config's data."""

    def make(train, cache="cache", **options):
        return prepare(Data(train=train, **options), tokenizer, tmp_path / cache)

    return make


def key(data, tokenizer, cache) -> str:
    found = find(data)
    return key_of(data, found, tokenizer, files_key(found, cache))


def texts(tokenizer, side) -> list[str]:
    return [tokenizer.decode(side.row(number).ids) for number in range(len(side))]


def test_what_is_read_back_is_what_the_encoder_gives(make, rows_file, tokenizer):
    made = make(rows_file)
    side = made.side("train")
    rows = [row for *_, row in read_rows(made.sources)]
    for number, tokens in enumerate(Encoder(tokenizer).encode(rows)):
        assert side.row(number).ids.tolist() == tokens.ids.tolist()
        assert side.row(number).trained.tolist() == tokens.trained.tolist()
        assert side.trained_lengths[number] == tokens.trained.sum()
        assert made.place("train", number) == f"{rows_file}:{number + 1}"
    counts = made.counts["train"]
    assert (counts.rows, counts.tokens) == (30, len(side.ids))
    assert isinstance(side.ids, np.memmap)


def test_any_number_of_processes_makes_the_same_files(tmp_path, make, monkeypatch):
    monkeypatch.setattr(build, "SMALL_BYTES", 0)
    monkeypatch.setattr("qwenlora.data.row_io.CHUNK_BYTES", 2000)
    file = write(tmp_path / "my.jsonl", rows_of(300))
    made = [make(file, cache=f"cache{n}", num_proc=n) for n in (1, 2, 3)]
    monkeypatch.setattr(build, "SMALL_BYTES", 2**30)
    made.append(make(file, cache="alone"))
    for other in made[1:]:
        assert other.folder.name == made[0].folder.name
        for path in (made[0].folder / "train").iterdir():
            assert (other.folder / "train" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_second_start_reads_nothing_but_the_index(tmp_path, make, rows_file, monkeypatch):
    os.utime(rows_file)
    time.sleep(2.1)  # a file that has just changed is not believed
    first = make(rows_file)
    monkeypatch.setattr("qwenlora.data.row_io.read_chunks", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert make(rows_file).index == first.index


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 64},
        {"overlength": "drop"},
        {"overlength": "split", "split_replies": True},
        {"train_on": "last_assistant"},
        {"eval_fraction": 0.1},
        {"format": "alpaca"},
        {"columns": {"input": None}},
        {"roles": {"bot": "assistant"}},
        {"encoding": "utf-8"},
    ],
)
def test_the_key_changes_with_each_option_that_the_tokens_depend_on(tmp_path, rows_file, tokenizer, options):
    keys = set()
    for data in (Data(train=rows_file), Data(train=rows_file, **options)):
        keys.add(key(data, tokenizer, tmp_path))
    assert len(keys) == 2


def test_the_key_does_not_change_with_what_only_says_how(tmp_path, rows_file, tokenizer):
    keys = set()
    for options in ({}, {"num_proc": 3}, {"on_bad_row": "skip"}, {"packing": "on"}, {"cache_dir": "x"}):
        data = Data(train=rows_file, **options)
        keys.add(key(data, tokenizer, tmp_path))
    assert len(keys) == 1


def test_the_key_changes_with_the_files_bytes_whatever_their_date(tmp_path, rows_file, tokenizer):
    data, path = Data(train=rows_file), tmp_path / "my.jsonl"
    before, stat = key(data, tokenizer, tmp_path), path.stat()
    path.write_bytes(path.read_bytes().replace("问题3".encode(), "问题4".encode()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key(data, tokenizer, tmp_path) != before


def test_the_key_changes_with_the_tokenizer_and_its_template(tmp_path, tokenizers, rows_file):
    data = Data(train=rows_file)
    keys = {key(data, tokenizer, tmp_path) for tokenizer in tokenizers.values()}
    tiny = copy.deepcopy(tokenizers["tiny"])
    tiny.chat_template += " "
    keys.add(key(data, tiny, tmp_path))
    assert len(keys) == len(tokenizers) + 1


def test_the_same_rows_under_another_name_are_not_prepared_again(tmp_path, make, rows_file):
    made = make(rows_file)
    other = tmp_path / "other.jsonl"
    other.write_bytes((tmp_path / "my.jsonl").read_bytes())
    again = make(str(other))
    assert again.folder == made.folder
    assert again.place("train", 0) == f"{other}:1", "messages speak of this run's file"


def test_two_splits_of_one_data_set_are_not_taken_for_each_other(tmp_path, tokenizer):
    import datasets

    saved = datasets.Dataset.from_list(rows_of(6))
    datasets.DatasetDict(a=saved.select(range(3)), b=saved.select(range(3, 6))).save_to_disk(
        tmp_path / "saved"
    )
    (whole,) = find(Data(train=SourceEntry(path=str(tmp_path / "saved"), split="a")))
    parts = [whole._replace(dataset=whole.dataset.select(some)) for some in ([0], [1])]
    assert parts[0].dataset.cache_files == parts[1].dataset.cache_files
    keys = {
        key_of(Data(train="x"), [part], tokenizer, files_key([part], tmp_path / "cache")) for part in parts
    }
    assert len(keys) == 2


# ---- what should not be trained


def refused(made, tokenizer, **options) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        made.refuse(Data(train="x", **options), tokenizer, len(tokenizer))
    return str(caught.value)


BAD = [*rows_of(2), {"instruction": "q"}, *rows_of(3), {"messages": []}]


def test_bad_rows_are_refused_with_their_places_or_left_out_and_listed(tmp_path, make, tokenizer):
    file = write(tmp_path / "my.jsonl", BAD)
    with pytest.raises(ValueError, match=r"^2 of 7 rows cannot be trained:\n  .*my\.jsonl:3: ") as caught:
        make(file)
    assert str(caught.value).endswith("\nmend or remove them, or leave them out: data.on_bad_row: skip")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "files"] == [], (
        "nothing half-read is kept"
    )
    made = make(file, on_bad_row="skip")
    made.refuse(Data(train=file, on_bad_row="skip"), tokenizer, len(tokenizer))
    assert (made.counts["train"].rows, made.index.bad.count) == (5, 2)
    assert [line.split(": ")[0] for line in made.bad_lines()] == [f"{file}:3", f"{file}:7"]
    assert "2 of 7 rows cannot be trained" in refused(made, tokenizer), (
        "the same rows, and they are not to be skipped"
    )


def test_the_report_shows_the_first_20_and_the_totals(tmp_path, make):
    file = write(
        tmp_path / "my.jsonl", [*rows_of(5), *({"instruction": f"q{n}", "output": n} for n in range(30))]
    )
    with pytest.raises(ValueError, match=r"^30 of 35 rows cannot be trained:") as caught:
        make(file)
    assert str(caught.value).count("output must be text, found") == 20
    assert "\n  and 10 more\n" in str(caught.value)


def test_a_source_without_any_good_row_is_refused_though_bad_rows_are_left_out(
    tmp_path, make, tokenizer, rows_file
):
    bad = write(tmp_path / "bad.jsonl", [{"messages": []}] * 3)
    made = make([rows_file, bad], on_bad_row="skip")
    assert refused(made, tokenizer, on_bad_row="skip").startswith(
        f"data.train={bad}: none of its rows can be trained\n"
    )


def test_an_empty_source_is_refused(tmp_path, make, tokenizer, rows_file):
    made = make([rows_file, write(tmp_path / "none.jsonl", [])])
    assert refused(made, tokenizer) == f"data.train={tmp_path}/none.jsonl is empty: it has no rows"


def test_long_rows_are_refused_unless_told(make, rows_file, tokenizer):
    made = make(rows_file, max_length=30)
    message = refused(made, tokenizer, max_length=30)
    assert " of 30 train rows are longer than data.max_length=30 tokens (the longest, " in message
    assert f"{rows_file}:30, has " in message
    assert message.endswith("raise data.max_length, or set data.overlength: truncate, drop or split")


def test_long_rows_are_cut_dropped_or_split_and_counted(tmp_path, make, rows_file, tokenizer):
    whole = make(rows_file).side("train").lengths
    long = int((whole > 30).sum())
    assert 0 < long < 30
    answers = write(
        tmp_path / "long.jsonl", [{"instruction": "问", "output": "很" * n + "。"} for n in range(1, 31)]
    )
    cut, uncut = (
        make(answers, max_length=30, overlength="truncate").counts["train"],
        make(answers).side("train").lengths,
    )
    assert (cut.truncated, cut.rows, cut.longest) == (int((uncut > 30).sum()), 30, 30)
    drop = make(rows_file, max_length=30, overlength="drop")
    counts = drop.counts["train"]
    assert (counts.dropped, counts.rows, counts.overlength) == (long, 30 - long, long)
    assert np.load(drop.folder / "train" / "whole.npy").tolist() == whole.tolist(), "the histogram's lengths"
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(20) for role in ("user", "assistant")]
    split = make(write(tmp_path / "chat.jsonl", [{"messages": turns}]), max_length=100, overlength="split")
    counts, side = split.counts["train"], split.side("train")
    assert (counts.split, counts.read_rows, counts.lost_replies) == (1, 1, 0)
    assert counts.rows == len(side) > 2
    assert side.row_of.tolist() == [0] * len(side)


def test_a_row_that_truncation_leaves_nothing_of_is_a_bad_row(tmp_path, make):
    file = write(tmp_path / "my.jsonl", [{"instruction": "很长的问题" * 20, "output": "答"}, *rows_of(3)])
    with pytest.raises(
        ValueError, match=r"my\.jsonl:1: truncated to data\.max_length=30 tokens of \d+, nothing of the"
    ):
        make(file, max_length=30, overlength="truncate")


def test_data_that_never_trains_the_end_of_a_turn_is_refused(tmp_path, make, tokenizer):
    file = write(tmp_path / "my.jsonl", [{"instruction": "问", "output": "很长的答案" * 20}])
    made = make(file, max_length=30, overlength="truncate")
    message = refused(made, tokenizer, max_length=30, overlength="truncate")
    assert message.startswith(
        "no train row trains the end of a turn (<|im_end|>), so the model would never stop;"
    )


def test_plain_text_has_no_turns_to_end(tmp_path, make, tokenizer):
    made = make(write(tmp_path / "my.jsonl", [{"text": "春眠不觉晓。"}, {"text": "处处闻啼鸟。"}]))
    made.refuse(Data(train="x"), tokenizer, len(tokenizer))
    assert made.counts["train"].trained_tokens == made.counts["train"].tokens - 2


def test_tokens_without_an_embedding_are_refused(tmp_path, make, tokenizer):
    file = write(tmp_path / "my.jsonl", rows_of(3))
    data, made = Data(train=file), make(file, eval=write(tmp_path / "eval.jsonl", [{"text": "<|im_end|>é"}]))
    ids = {int(token) for side in ("train", "eval") for token in made.side(side).ids}
    used = {int(token) for side in ("train", "eval") for token in prepared.used_tokens(made.folder, side)}
    assert used == ids
    for wanting in (1, 2, 5):  # of the largest ids that rows or padding have
        *_, last = first, *_ = sorted({*ids, tokenizer.pad_token_id})[-wanting:]
        made.refuse(data, tokenizer, last + 1)
        with pytest.raises(ValueError, match="which the rows or their padding use") as caught:
            made.refuse(data, tokenizer, first)
        names = f"the base has no embedding for {tokenizer.decode([first])}"
        assert str(caught.value).startswith(names)
        assert ("and 2 more" in str(caught.value)) == (wanting == 5)
        assert f"it has {first:,}, the tokenizer {len(tokenizer):,} tokens; enlarge the base" in str(
            caught.value
        )


def test_a_pad_token_without_an_embedding_is_refused(tmp_path, make, tokenizer):
    made = make(write(tmp_path / "my.jsonl", rows_of(3)))
    padding = copy.deepcopy(tokenizer)
    padding.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"no embedding for \[PAD\], which the rows or their padding use"):
        made.refuse(Data(train="x"), padding, len(tokenizer))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, make, rows_file, monkeypatch):
    tokenise_chunk = build.tokenise_chunk

    def meanwhile(*arguments, **options):
        with (tmp_path / "my.jsonl").open("a") as file:
            file.write("\n")
        return tokenise_chunk(*arguments, **options)

    monkeypatch.setattr(build, "tokenise_chunk", meanwhile)
    with pytest.raises(ValueError, match="a data file was changed while it was read; start again"):
        make(rows_file)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, make, rows_file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.ArrayWriter, "finish", full)
    with pytest.raises(
        ValueError, match=r"data\.cache_dir=.*cache cannot hold the prepared rows: No space left"
    ):
        make(rows_file)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "files"] == []


def test_a_cache_without_room_is_refused_before_anything_is_read(make, rows_file, monkeypatch):
    monkeypatch.setattr(build, "free_bytes", lambda _: 10)
    with pytest.raises(ValueError, match=r"data\.cache_dir=.* has 0 MiB free, the prepared rows need about"):
        make(rows_file)


# ---- two sides, several sources


def test_eval_fraction_moves_no_row_when_rows_are_appended(tmp_path, make, tokenizer):
    all_rows = rows_of(400, words=0)
    before = make(write(tmp_path / "a.jsonl", all_rows[:300]), eval_fraction=0.1)
    after = make(write(tmp_path / "b.jsonl", [*all_rows[300:], *all_rows[:300]]), eval_fraction=0.1)
    sides = [
        {side: set(texts(tokenizer, made.side(side))) for side in ("train", "eval")}
        for made in (before, after)
    ]
    assert 15 < len(sides[0]["eval"]) < 50
    assert sides[0]["train"] <= sides[1]["train"]
    assert sides[0]["eval"] <= sides[1]["eval"]
    assert not sides[1]["train"] & sides[1]["eval"]


def test_a_row_that_is_written_otherwise_stays_on_its_side(tmp_path, make):
    rows = rows_of(200, words=0)
    chats = [
        {
            "conversations": [
                {"from": "human", "value": r["instruction"]},
                {"from": "gpt", "value": r["output"]},
            ]
        }
        for r in rows
    ]
    made = [
        make(write(tmp_path / f"{n}.jsonl", some), eval_fraction=0.2) for n, some in enumerate((rows, chats))
    ]
    assert made[0].counts["eval"].sha256 == made[1].counts["eval"].sha256


def test_rows_on_both_sides_and_duplicates_are_counted(tmp_path, make):
    train = write(tmp_path / "a.jsonl", [*rows_of(10), *rows_of(3)])
    eval_ = write(tmp_path / "b.jsonl", [*rows_of(2), {"instruction": "neu", "output": "ja"}])
    made = make(train, eval=eval_)
    assert made.index.overlap == Overlap(rows=2, first=[0, 1])
    assert made.place("eval", 0) == f"{eval_}:1"
    assert made.counts["train"].duplicates == 3


def test_weights_say_how_often_an_epoch_sees_a_source(tmp_path, make, tokenizer):
    one, two = (
        write(tmp_path / name, [{"instruction": f"{name}{n}", "output": "a"} for n in range(100)])
        for name in "ab"
    )
    made = make([SourceEntry(path=one, weight=2.0), SourceEntry(path=two, weight=0.5)])
    seen = texts(tokenizer, made.side("train"))
    first = [text for text in seen if "\na" in text and "<|im_start|>user\na" in text]
    second = [text for text in seen if "<|im_start|>user\nb" in text]
    assert len(first) == 200
    assert len(set(first)) == 100
    assert 30 < len(second) == len(set(second)) < 70
    assert made.counts["train"].tokens == sum(len(made.side("train").row(n).ids) for n in range(len(seen)))


def test_options_of_a_source_are_its_own(tmp_path, make, tokenizer):
    one = write(tmp_path / "a.jsonl", [{"frage": "几点？", "antwort": "三点。"}])
    two = write(tmp_path / "b.jsonl", rows_of(1))
    made = make([SourceEntry(path=one, columns={"frage": "instruction", "antwort": "output"}), two])
    assert "三点。" in texts(tokenizer, made.side("train"))[0]


def changed_meanwhile(monkeypatch, file, rows):
    """Rewrite the file after it was hashed and before it is read, as one that waits for another builder may
    find it."""
    build_once = prepared.build_once

    def later(*arguments):
        write(file, rows)
        return build_once(*arguments)

    monkeypatch.setattr(prepared, "build_once", later)


def test_a_file_that_changes_after_it_was_hashed_is_never_kept_under_its_old_bytes(
    tmp_path, make, monkeypatch
):
    file = tmp_path / "my.jsonl"
    write(file, rows_of(5))
    with monkeypatch.context() as patch:
        changed_meanwhile(patch, file, rows_of(6))
        with pytest.raises(ValueError, match="a data file was changed while it was read; start again"):
            make(str(file))
    write(file, rows_of(5))
    assert make(str(file)).counts["train"].rows == 5


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.25])
def test_a_weight_of_training_rows_changes_no_evaluation(tmp_path, make, tokenizer, weight):
    file = write(tmp_path / "my.jsonl", rows_of(200, words=0))
    data = {"train": SourceEntry(path=file, weight=weight), "eval_fraction": 0.2}
    made, counted = make(**data), survey(Data(**data))
    assert made.counts["eval"].rows == counted.eval == 34
    assert made.counts["train"].rows == counted.train


def test_a_fraction_of_a_weight_and_of_eval_choose_independently(tmp_path, make):
    file = write(tmp_path / "my.jsonl", rows_of(400, words=0))
    made = make(SourceEntry(path=file, weight=0.5), eval_fraction=0.5)
    assert 150 < made.counts["eval"].rows < 250
    assert 60 < made.counts["train"].rows < 140, "half of the other half"


def test_the_key_changes_with_weight_side_kind_libraries_and_special_tokens(
    tmp_path, rows_file, tokenizer, monkeypatch
):
    other = tmp_path / "my.csv"
    other.write_bytes((tmp_path / "my.jsonl").read_bytes())
    plain = Data(train=rows_file)
    keys = [
        key(plain, tokenizer, tmp_path),
        key(Data(train=SourceEntry(path=rows_file, weight=2.0)), tokenizer, tmp_path),
        key(Data(train=rows_file, eval=rows_file), tokenizer, tmp_path),
        key(Data(train=str(other)), tokenizer, tmp_path),
    ]
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = "<|endoftext|>"
    keys.append(key(plain, ended, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(prepared.metadata, "version", lambda name: "0")
        keys.append(key(plain, tokenizer, tmp_path))
    assert len(set(keys)) == len(keys)


CODE_OF_ROWS = (
    *("arrays", "bad_row", "build", "chat", "chunks", "counts", "encodings", "folders", "forms"),
    *("json_rows", "marks", "nulls", "overlength", "packing", "plain_text", "prepared", "replies", "row_io"),
    *("rows", "shapes", "sources", "tables", "template", "tokenise", "tools", "turns", "weights"),
)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Return the folder of a copy of the package, whose code is hashed instead of the real one's."""
    package.snapshot(tmp_path / "copy")
    monkeypatch.setattr(package, "package", lambda: tmp_path / "copy" / "qwenlora")
    return tmp_path / "copy" / "qwenlora"


def test_rows_that_other_code_prepared_are_not_taken(code, tmp_path, rows_file, tokenizer):
    def now() -> str:
        return key(Data(train=rows_file), tokenizer, tmp_path)

    before = now()
    keys = {before}
    for name in CODE_OF_ROWS:
        with (code / "data" / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        keys.add(now())
    (code / "data" / "new.py").touch()
    keys.add(now())
    (code / "data" / "new.py").rename(code / "data" / "other_name.py")
    keys.add(now())
    (code / "data" / "inner").mkdir()
    (code / "data" / "inner" / "__init__.py").touch()
    keys.add(now())
    (code / "data" / "inner" / "deep.py").write_text("x = 1\n")
    keys.add(now())
    (code / "data" / "inner" / "deep.py").write_text("x = 2\n")
    keys.add(now())
    (code / "data" / "inner" / "deep.py").unlink()
    keys.add(now())
    assert len(keys) == len(CODE_OF_ROWS) + 5, "an empty __init__.py changes nothing"


def test_rows_are_taken_whatever_code_that_they_do_not_depend_on_is(code, tmp_path, rows_file, tokenizer):
    data = Data(train=rows_file)
    before = key(data, tokenizer, tmp_path)
    for name in ("data/order.py", "data/freshness.py", "data/report.py", "data/survey.py", "run/disk.py"):
        with (code / name).open("a") as file:
            file.write("# changed\n")
    (code / "data" / "page.html").write_text("changed")
    (code / "data" / "notes.txt").touch()
    assert key(data, tokenizer, tmp_path) == before


def test_every_file_of_the_room_is_known_to_matter_or_not():
    names = {path.stem for path in Path(prepared.__file__).parent.glob("*.py")}
    others = {name.removesuffix(".py") for name in prepared._NO_MATTER}
    assert names == {*CODE_OF_ROWS, *others}


def test_the_identity_of_rows_tells_masks_weights_and_texts_apart(tmp_path, make):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    file = write(tmp_path / "my.jsonl", [{"messages": turns}])
    made = [make(file), make(file, train_on="all"), make(SourceEntry(path=file, weight=2.0))]
    assert len({one.counts["train"].sha256 for one in made}) == 3
    texts = write(tmp_path / "texts.jsonl", [{"text": f"text {n}"} for n in range(50)])
    counts = make(texts, eval_fraction=0.3).counts
    assert counts["train"].duplicates == counts["eval"].duplicates == 0
    assert 0 < counts["eval"].rows < 50


def test_the_packs_that_are_kept_are_of_max_length(make, rows_file):
    made = make(rows_file, max_length=100)
    lengths = made.packs().lengths(made.side("train").lengths)
    assert lengths.max() <= 100
    assert len(lengths) == made.counts["train"].packs


def test_a_reply_that_fits_nowhere_is_counted(tmp_path, make):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "很长" * 100}]
    made = make(write(tmp_path / "my.jsonl", [{"messages": turns}]), max_length=60, overlength="split")
    counts = made.counts["train"]
    assert (counts.overlength, counts.split, counts.dropped, counts.lost_replies) == (1, 1, 0, 1)
    made = make(
        write(tmp_path / "my.jsonl", [{"messages": turns[-2:]}, {"messages": turns}]),
        max_length=60,
        overlength="split",
    )
    counts = made.counts["train"]
    assert (counts.overlength, counts.split, counts.dropped, counts.lost_replies) == (2, 1, 1, 2)


def test_only_sources_with_bad_rows_are_counted_with_them(tmp_path, make):
    clean, bad = write(tmp_path / "a.jsonl", rows_of(30)), write(tmp_path / "b.jsonl", BAD)
    with pytest.raises(ValueError, match=r"^2 of 7 rows cannot be trained"):
        make([clean, bad])


def test_eval_fraction_that_leaves_a_side_empty_is_refused(make, rows_file, tokenizer):
    for fraction, message in (
        (1e-9, "no row to evaluate on: there are only 30; raise it"),
        (1 - 1e-9, "no row to train on"),
    ):
        made = make(rows_file, eval_fraction=fraction)
        assert message in refused(made, tokenizer, eval_fraction=fraction)


def test_a_process_that_is_killed_for_memory_is_said(make, rows_file, monkeypatch):
    monkeypatch.setattr(build, "SMALL_BYTES", 0)
    monkeypatch.setattr(build, "tokenise_chunk", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match=r"most likely for lack of memory; lower data\.num_proc \(now 2\)"):
        make(rows_file, num_proc=2)


def test_parquet_and_json_lines_of_the_same_tool_calls_are_the_same_rows(tmp_path, tokenizers, make):
    import pyarrow as pa
    from pyarrow import parquet

    if "qwen3" not in tokenizers:
        pytest.skip("the qwen3 tokenizer is not here")
    rows = []
    for arguments in ({"city": "北京"}, {"zone": 8}):
        tool = {"name": "f", "parameters": {"properties": {name: {"type": "string"} for name in arguments}}}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        rows.append({"messages": [{"role": "user", "content": "问"}, call], "tools": [tool]})
    write(tmp_path / "a.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = [str(tmp_path / name) for name in ("a.jsonl", "a.parquet")]
    made = [prepare(Data(train=file), tokenizers["qwen3"], tmp_path / "c") for file in files]
    assert made[0].counts["train"].sha256 == made[1].counts["train"].sha256


PREPARE = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from qwenlora.configs.schema import Data
from qwenlora.data import build
from qwenlora.data.prepared import prepare
build.SMALL_BYTES = 0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("ready", flush=True)
data = Data(train=sys.argv[2], num_proc=2)
made = prepare(data, tokenizer, Path(sys.argv[3]), say=lambda line: print(line, flush=True))
print(made.counts["train"].sha256, flush=True)
"""


def start_preparing(folder, tiny, file) -> subprocess.Popen:
    script = folder / "prepare.py"
    script.write_text(PREPARE)
    command = [sys.executable, script, tiny, file, folder / "cache"]
    process = forked.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_of_two_preparations_one_is_killed_and_the_other_ends_right_and_a_third_too(
    tmp_path, tiny, tokenizer
):
    file = write(
        tmp_path / "my.jsonl",
        [{"instruction": f"问题{n}" * 20, "output": f"答案{n}。" * 20} for n in range(12_000)],
    )

    def start() -> subprocess.Popen:
        return start_preparing(tmp_path, tiny, file)

    def staging() -> list:
        return [
            path for path in (tmp_path / "cache").glob("*.staging-*") if (path / "train" / "ids.bin").exists()
        ]

    first = start()
    while not staging() or not (staging()[0] / "train" / "ids.bin").stat().st_size:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # else it may end before the second has looked
    second = start()
    assert f"waiting for process {first.pid} on " in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    said = second.communicate(timeout=500)[0].splitlines()
    assert "has ended without finishing: preparing the data here" in said[0]
    third = start().communicate(timeout=500)[0]
    expected = prepare(Data(train=file), tokenizer, tmp_path / "other").counts["train"]
    assert said[-1] == third.strip() == expected.sha256
    assert expected.rows == 12_000
    assert len(list((tmp_path / "cache").glob("*.staging-*"))) == 0


def test_a_killed_preparation_takes_its_processes_with_it(tmp_path, tiny):
    psutil = pytest.importorskip("psutil")
    file = write(
        tmp_path / "my.jsonl", [{"instruction": "问" * 200, "output": "答" * 200} for _ in range(30_000)]
    )
    process = start_preparing(tmp_path, tiny, file)
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=500)
    assert alive == []


def test_no_side_is_opened_that_is_not_there(make, rows_file):
    assert open_side(make(rows_file).folder, "eval") is None
    assert (
        prepared.open_packs(make(rows_file).folder).lengths(make(rows_file).side("train").lengths).sum() > 0
    )
