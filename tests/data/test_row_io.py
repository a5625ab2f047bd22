"""Rows and their lines are the same however a file is written, compressed, and cut into blocks."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qwenlora.data import chunks, json_rows, tables
from qwenlora.data import row_io as files
from qwenlora.data.bad_row import BadRow, show, show_names
from qwenlora.data.chunks import Values
from qwenlora.data.json_rows import Lines
from qwenlora.data.row_io import read_chunks
from qwenlora.data.tables import dataset_chunks

spaces = st.text(alphabet=" \t\r\n", max_size=4)
texts = st.text(alphabet=st.sampled_from('三点"\\\n{}[],:é\u2028😀 a'), max_size=12)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def read(path: Path, **options: Any) -> list[tuple[int, Any]]:
    """Return (line, value or the reason of the BadRow) of all rows."""
    found = [row for chunk in read_chunks(path, **options) for row in chunk.values()]
    return [(line, str(value) if isinstance(value, BadRow) else value) for line, value in found]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(
    rows=st.lists(st.tuples(spaces, values, spaces), max_size=5),
    space=st.tuples(spaces, spaces),
    indent=st.sampled_from([None, 1]),
    ascii_=st.booleans(),
    block=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_an_array_is_the_same_rows_and_lines_whatever_its_blocks_are(
    folder, rows, space, indent, ascii_, block
):
    text, expected = f"{space[0]}[", []
    for number, (before, value, after) in enumerate(rows):
        text += ("," if number else "") + before
        expected.append((text.count("\n") + 1, value))
        text += json.dumps(value, indent=indent, ensure_ascii=ascii_) + after
    text += f"]{space[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", block)
        patch.setattr(chunks, "CHUNK_ROWS", 2)
        assert read(written(folder / "my.json", text)) == expected


@given(
    rows=st.lists(st.tuples(st.sampled_from(["\n", "\r\n", "\n \n", "\n\r\n\n"]), values), max_size=6),
    end=st.sampled_from(["", "\n", "\r\n\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    block=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_json_lines_are_the_same_rows_whatever_their_blocks_are(folder, rows, end, mark, block):
    text, expected = "{}", [(1, {})]
    for between, value in rows:
        text += between
        expected.append((text.count("\n") + 1, value))
        text += json.dumps(value, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", block)
        assert read(written(folder / "my.jsonl", mark + (text + end).encode())) == expected


@given(
    rows=st.lists(
        st.lists(texts.filter(lambda text: "\u2028" not in text), min_size=2, max_size=2), max_size=5
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    block=st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_a_table_is_the_same_rows_whatever_its_blocks_are(folder, rows, end, block):
    text, expected = f"a,b{end}", []
    for row in rows:
        expected.append((text.count("\n") + 1, dict(zip("ab", row, strict=True))))
        text += ",".join('"' + cell.replace('"', '""') + '"' for cell in row) + end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", block)
        assert read(written(folder / "my.csv", text)) == expected


@given(value=values, cut=st.integers(1, 10**6), block=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_an_array_that_was_cut_off_anywhere_is_refused(folder, value, cut, block):
    text = json.dumps([value, {"a": value}, [value]], ensure_ascii=False)
    text = text[: 1 + cut % (len(text) - 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", block)
        with pytest.raises(ValueError, match=r"my\.json:1: (the array is not closed|not valid JSON)"):
            read(written(folder / "my.json", text))


def test_white_space_within_a_row_may_be_longer_than_a_block(tmp_path, monkeypatch):
    space = " " * 100 + "\n"
    tokens = [
        "[",
        "{",
        '"a"',
        ":",
        "[",
        "1",
        ",",
        "true",
        "]",
        ",",
        '"b"',
        ":",
        "{",
        "}",
        "}",
        ",",
        "-1.5e3",
        "]",
    ]
    path = written(tmp_path / "my.json", space.join(tokens))
    for block in (1, 20, 99, 2**20):
        monkeypatch.setattr(files, "CHUNK_BYTES", block)
        assert read(path) == [(2, {"a": [1, True], "b": {}}), (17, -1500.0)]


def test_what_is_inside_decides_not_the_name(tmp_path):
    for name in ("my.json", "my.jsonl", "my.ndjson", "my.txt", "my"):
        assert read(written(tmp_path / name, '[{"a": 1},\n{"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]
        assert read(written(tmp_path / name, '{"a": 1}\n{"a": 2}')) == [(1, {"a": 1}), (2, {"a": 2})]
    file = io.BytesIO()
    parquet.write_table(pa.table({"a": [1, 2]}), file)
    assert read(written(tmp_path / "my.json", file.getvalue())) == [(1, {"a": 1}), (2, {"a": 2})]


turns = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3)


@given(
    talks=st.lists(turns, min_size=1, max_size=4),
    indent=st.sampled_from([None, 1]),
    space=spaces,
    block=st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_lists_of_turns_are_rows_one_after_the_other_or_in_one_list(folder, talks, indent, space, block):
    written_talks = [json.dumps(talk, indent=indent) for talk in talks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", block)
        one_after_the_other = read(written(folder / "my.json", space + f"{space}\n".join(written_talks)))
        in_one_list = read(written(folder / "my.json", f"[{space}{','.join(written_talks)}{space}]"))
    assert [value for _, value in one_after_the_other] == [value for _, value in in_one_list] == talks


def test_lines_of_turns_with_other_keys_are_rows(tmp_path):
    talk = '[{"who": "a", "said": "b"}]'
    assert read(written(tmp_path / "my.jsonl", f"{talk}\n{talk}\n")) == [
        (1, [{"who": "a", "said": "b"}]),
        (2, [{"who": "a", "said": "b"}]),
    ]
    with pytest.raises(ValueError, match=r"my.jsonl:2: the array is not closed"):
        read(written(tmp_path / "my.jsonl", '[{"role": "a", "content": "b"}]\n[{"role": "a"'))
    with pytest.raises(ValueError, match=r'my.jsonl:2: expected a list of turns, as before it, found "{"'):
        read(written(tmp_path / "my.jsonl", '[{"role": "a", "content": "b"}]\n{}'))


said = st.text(alphabet=st.sampled_from('三点 \t\u3000a{["<'), min_size=1, max_size=12).filter(str.strip)


@given(
    paragraphs=st.lists(st.lists(said, min_size=1, max_size=3), min_size=2, max_size=4),
    blank=st.sampled_from(["", " ", "\u3000", "\n"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]),
    block=st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_plain_text_is_its_paragraphs_or_its_lines(folder, paragraphs, blank, newline, encoding, block):
    paragraphs[0][0] = "三点" + paragraphs[0][0]  # what begins as JSON is JSON
    texts = ["\n".join(lines) for lines in paragraphs]
    lines = [line for paragraph in paragraphs for line in paragraph]
    options = {"encoding": encoding} if encoding == "gb18030" else {}
    with pytest.MonkeyPatch.context() as patch:
        for rows, kind, text in (
            (texts, "paragraph", f"\n{blank}\n".join(texts)),
            (lines, "line", "\n".join(lines)),
        ):
            if len(rows) == 1:
                continue
            patch.setattr(files, "CHUNK_BYTES", max(block, 4 * len(text) + 9))  # a blank line is in the first
            path = written(folder / "my.txt", text.replace("\n", newline).encode(encoding))
            notes = []
            assert [value["text"] for _, value in read(path, note=notes.append, **options)] == rows
            assert f"each {kind} is a row" in notes[0]


def test_plain_text_knows_its_lines_and_may_be_gbk(tmp_path):
    path = written(tmp_path / "my.txt", "\n\n春眠不觉晓，\n处处闻啼鸟。\n\n夜来风雨声，\n".encode("gbk"))
    notes: list[str] = []
    assert read(path, note=notes.append) == [
        (3, {"text": "春眠不觉晓，\n处处闻啼鸟。"}),
        (6, {"text": "夜来风雨声，"}),
    ]
    assert [note.split("; ")[0] for note in notes] == [
        f"{path} is read as GB18030",
        f"{path} is read as plain text: each paragraph is a row",
    ]
    assert read(written(tmp_path / "my.txt", "")) == []


def test_json_lines_are_not_decoded_before_they_are_asked_for(tmp_path):
    found = list(read_chunks(written(tmp_path / "my.jsonl", '{"a": 1}\n{"a": \n')))
    assert all(isinstance(chunk, Lines) for chunk in found)
    assert all(
        isinstance(chunk, Values) for chunk in read_chunks(written(tmp_path / "my.json", '[{"a": 1}]'))
    )


def test_a_large_file_comes_in_chunks_that_say_how_much_was_read(tmp_path):
    row = json.dumps({"a": "x" * 1000})
    for text in ("\n".join([row] * 5000), f"[{','.join([row] * 5000)}]", "a\n" + "xyz\n" * 5000):
        path = written(tmp_path / ("my.csv" if text[0] == "a" else "my.json"), text)
        found = list(read_chunks(path))
        assert len(found) >= 5
        assert sum(len(list(chunk.values())) for chunk in found) == 5000
        read_bytes = [chunk.read for chunk in found]
        assert read_bytes == sorted(read_bytes)
        assert read_bytes[-1] == path.stat().st_size


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_compressed_file_of_many_members_is_one_file(tmp_path, monkeypatch, codec):
    def pack(part: bytes) -> bytes:
        return gzip.compress(part) if codec == "gzip" else pa.compress(part, codec=codec, asbytes=True)

    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    text = "".join(json.dumps({"a": f"三{n}"}, ensure_ascii=False) + "\n" for n in range(200)).encode()
    content = b"".join(pack(text[start : start + 333]) for start in range(0, len(text), 333))
    rows = read(
        written(tmp_path / "my.jsonl.gz", content)
        if codec == "gzip"
        else written(tmp_path / "my.zst", content)
    )
    assert rows == [(n + 1, {"a": f"三{n}"}) for n in range(200)]


def test_a_row_of_a_table_stands_on_the_line_it_begins_on(tmp_path):
    path = written(tmp_path / "my.csv", 'a,b\n"1\n\n1",2\n\n3,"4\r\n4"\n5\n6,7\n')
    assert read(path) == [
        (2, {"a": "1\n\n1", "b": "2"}),
        (6, {"a": "3", "b": "4\r\n4"}),
        (
            8,
            'has 1 columns, the first line names 2; a text with a "," or a line break is written in double'
            " quotes",
        ),
        (9, {"a": "6", "b": "7"}),
    ]


def test_the_separator_of_a_table_is_found_and_told(tmp_path):
    notes: list[str] = []
    for name, text in (("a.csv", "a;b\n1;2,3\n"), ("b.csv", "a\tb\n1\t2,3\n"), ("c.tsv", "a\tb\n1\t2,3\n")):
        assert read(written(tmp_path / name, text), note=notes.append) == [(2, {"a": "1", "b": "2,3"})]
    assert [note.partition(" is read as ")[2] for note in notes] == ['separated by ";"', 'separated by "\\t"']


def test_a_table_in_gb18030_is_found_and_told(tmp_path):
    notes: list[str] = []
    path = written(tmp_path / "my.csv", "问,答\n现在几点？,𠮷三点。\n".encode("gb18030"))
    assert read(path, note=notes.append) == [(2, {"问": "现在几点？", "答": "𠮷三点。"})]
    assert notes == [f"{path} is read as GB18030; if its text looks wrong, set data.encoding"]
    assert read(path, encoding="gb18030", note=notes.append) == [(2, {"问": "现在几点？", "答": "𠮷三点。"})]
    assert len(notes) == 1


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "utf-8-sig", "big5"]
)
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_text_of_another_encoding_is_read_as_it_was_meant(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(files, "CHUNK_BYTES", block)
    for name, text in (
        ("my.json", '[{"a": "幾點"},\n{"a": "三點"}]'),
        ("my.jsonl", '{"a": "幾點"}\n{"a": "三點"}'),
    ):
        path = written(tmp_path / name, text.encode(encoding))
        assert read(path, encoding=encoding) == [(1, {"a": "幾點"}), (2, {"a": "三點"})]
    path = written(tmp_path / "my.csv", "a\n幾點\n".encode(encoding))
    assert read(path, encoding=encoding) == [(2, {"a": "幾點"})]


def test_the_place_of_an_error_is_right_in_a_long_line(tmp_path, monkeypatch):
    good = ", ".join(['{"a": "三三三"}'] * 300)
    path = written(tmp_path / "my.json", f'[\n{good}, {{"a": tru}}]')
    for block in (7, 100, 2**20):
        monkeypatch.setattr(files, "CHUNK_BYTES", block)
        with pytest.raises(
            ValueError, match=rf"my\.json:2: not valid JSON: expecting value at column {len(good) + 9}$"
        ):
            read(path)
    path = written(tmp_path / "my.csv", "a\n" + "x" * 300 + "三".encode().decode("latin-1"))
    path.write_bytes(b"a\n" + b"x" * 300 + b"\xff\xff\xff\n")
    for block in (7, 100, 2**20):
        monkeypatch.setattr(files, "CHUNK_BYTES", block)
        with pytest.raises(ValueError, match=r"not UTF-8 text at byte 302; if it is another encoding"):
            read(path, encoding="utf-8")


def test_parquets_turns_have_only_the_keys_that_hold_something(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 2)
    turns = [
        {"role": "user", "content": "几点？"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]},
    ]
    parquet.write_table(pa.table({"messages": [turns, turns, None]}), tmp_path / "my.parquet")
    found = list(read_chunks(tmp_path / "my.parquet"))
    full = [{"role": "user", "content": "几点？", "tool_calls": None}, turns[1]]
    assert [len(list(chunk.values())) for chunk in found] == [2, 1]
    said = [{key: value for key, value in turn.items() if value is not None} for turn in full]
    assert read(tmp_path / "my.parquet") == [(1, {"messages": said}), (2, {"messages": said}), (3, {})]
    assert found[-1].read == (tmp_path / "my.parquet").stat().st_size


@pytest.mark.parametrize("saved", [False, True])
def test_a_data_set_of_the_library_is_its_rows(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 2)
    rows = [{"messages": [{"role": "user", "content": f"问{n}"}], "id": n} for n in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    if saved:
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(str(tmp_path / "saved"))
    found = list(dataset_chunks(dataset.with_format("numpy")))
    assert [row for chunk in found for row in chunk.values()] == list(enumerate(rows, 1))
    assert [len(list(chunk.values())) for chunk in found] == [2, 2, 1]


def test_a_line_longer_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 2**10)
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 2**20)
    for name, text, what in (
        ("my.jsonl", '{"a": 1}\n{"a": "%s"}', "2: this line is longer than 1 MiB; one row a line"),
        ("my.json", '[{"a": 1},\n{"a": "%s"}]', "2: this row is longer than 1 MiB"),
        ("my.csv", "a\n1\n%s\n", "3: not valid CSV: field larger than field limit"),
    ):
        with pytest.raises(ValueError, match=rf"{name}:{what}"):
            read(written(tmp_path / name, text % ("x" * 2**21)))


def test_a_reason_is_one_line_that_can_be_shown():
    assert str(BadRow("a\nb\x1b\ud83d三")) == "a\\nb\\x1b\\ud83d三"
    assert show({"a": "x" * 100}) == '{"a": "' + "x" * 50 + "..."
    assert show(["\ud83d", b"", float("nan")]) == '["\\ud83d", "<bytes>", NaN]'
    assert show_names(["a", "\n", *["x" * 50] * 10]) == f"a, \\n, {', '.join(['x' * 37 + '...'] * 8)} ..."
