"""`qwenlora data check` and `preview` show the rows as they would be trained, on a screen and as a page."""

import io
import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from qwenlora.configs import load_config
from qwenlora.data import report
from qwenlora.trainer.data_check import check, preview


@pytest.fixture
def config(tmp_path):
    def config(rows=None, **overrides):
        rows = rows or [{"instruction": f"问题{n}" * (n + 1), "output": f"答案{n}。"} for n in range(40)]
        (tmp_path / "my.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        (tmp_path / "my.yaml").write_text(
            f"model: {{name_or_path: tiny}}\ndata: {{train: '{tmp_path}/my.jsonl'}}\n"
        )
        return load_config(tmp_path / "my.yaml", {"run_dir": str(tmp_path / "runs" / "my"), **overrides})

    return config


def screen(*, colour: bool = False) -> Console:
    terminal = {"force_terminal": True, "color_system": "standard"} if colour else {}
    return Console(file=io.StringIO(), width=100, markup=False, highlight=False, **terminal)


def test_check_shows_counts_and_a_page_with_the_same(config, tmp_path):
    console = screen()
    assert check(config(**{"data.eval_fraction": 0.2}), None, console) == 0
    shown = console.file.getvalue()
    page = (tmp_path / "runs" / "my.data.html").read_text()
    for words in (
        "40 rows",
        "tokenizer",
        "1.4 to 2 times as many",
        "training rows",
        "evaluation rows",
        "packs",
        "padding",
        "steps",
        "in both",
        "ready to train",
    ):
        assert words in shown, words
        assert words in page, words
    assert str(tmp_path / "runs" / "my.data.html") in shown.replace("\n", "")
    assert "http" not in page, "it opens from disk, without a network"
    assert "<script" not in page, "it opens from disk, without a network"
    assert not (tmp_path / "runs" / "my").exists(), "looking makes no run"


@pytest.mark.parametrize("key", ["tokenizer", "name_or_path"])
def test_check_says_whose_tokenizer_counts(config, tiny, key):
    console = screen()
    console.width = 400
    check(config(**{f"model.{key}": str(tiny)}), None, console)
    (line,) = (line for line in console.file.getvalue().splitlines() if line.startswith("tokenizer "))
    assert line.split() == ["tokenizer", str(tiny)]


def test_check_refuses_tokens_that_the_base_has_no_embedding_for(config, tiny, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<loc_{number:03d}>" for number in range(200)])
    tokenizer.save_pretrained(folder)
    rows = [{"instruction": "在哪里？<loc_198>", "output": "<loc_199>"}]
    console = screen()
    assert check(config(rows, **{"model.name_or_path": str(folder)}), None, console) == 2
    refusal = "would be refused: the base has no embedding for <loc_198>, <loc_199>, which the rows"
    assert refusal in console.file.getvalue()


def test_check_says_what_would_be_refused_and_leaves_with_2(config, tmp_path):
    console = screen()
    assert check(config([{"instruction": "q", "output": "a"}, {"instruction": "q"}]), None, console) == 2
    assert "would be refused: 1 of 2 rows cannot be trained:" in console.file.getvalue()
    listed = (tmp_path / "runs" / "my.data.bad_rows.txt").read_text()
    assert [line.split(": ")[0] for line in listed.splitlines()] == [f"{tmp_path}/my.jsonl:2"]
    console = screen()
    assert check(config(**{"data.max_length": 40}), None, console) == 2
    assert re.search(r"over-length +\d+ of 40, the longest \d+: refused", console.file.getvalue())
    assert "--- data.max_length=40 ---" in console.file.getvalue()
    assert check(config([{"frage": "a", "antwort": "b"}]), None, console) == 2
    assert "data.columns: {frage: instruction, antwort: output}" in console.file.getvalue(), "all are bad"


def test_training_starts_from_what_check_has_prepared(config, monkeypatch):
    from qwenlora.data import build

    check(config(), None, screen())
    monkeypatch.setattr(build, "build_arrays", lambda *_: pytest.fail("prepared again"))
    check(config(), None, screen())


def test_a_page_shows_a_users_markup_as_text(config, tmp_path):
    made = config(run_dir=str(tmp_path / "runs" / "<b>"))
    check(made, tmp_path / "page.html", screen())
    assert "<b>" not in (tmp_path / "page.html").read_text()


def test_preview_marks_exactly_the_trained_tokens(config):
    console = screen()
    preview(config(), "train", 3, 2, ids=False, console=console)
    shown = console.file.getvalue()
    assert "my.jsonl:3: " in shown
    assert "my.jsonl:4: " in shown
    assert "my.jsonl:5: " not in shown
    assert "⟦答案2。<|im_end|>⟧" in shown
    assert "问题2问题2问题2<|im_end|>\n" in shown


def test_preview_breaks_no_line_that_the_row_does_not_break(config):
    console = screen()
    preview(
        config([{"instruction": "word " * 100, "output": "a\tb"}]), "train", 1, 1, ids=False, console=console
    )
    assert "word " * 100 in console.file.getvalue()
    assert "⟦a⇥b<|im_end|>⟧" in console.file.getvalue()


def test_preview_colours_them_in_a_terminal(config):
    console = screen(colour=True)
    preview(config(), "train", 1, 1, ids=False, console=console)
    assert re.search("\x1b\\[30;42m答案0。<\\|im_end\\|>\x1b\\[0m", console.file.getvalue())


def test_preview_as_a_table_shows_ids_and_what_is_trained(config):
    console = screen()
    preview(config(), "train", 1, 1, ids=True, console=console)
    lines = console.file.getvalue().splitlines()
    end = [line.split() for line in lines if "<|im_end|>" in line]
    assert [fields[-1] for fields in end] == ["<|im_end|>", "yes"], (
        "the question's is not trained, the reply's is"
    )


def test_preview_shows_what_becomes_of_a_long_row(config):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(20) for role in ("user", "assistant")]
    console = screen()
    preview(
        config([{"messages": turns}], **{"data.max_length": 100, "data.overlength": "split"}),
        "train",
        1,
        1,
        ids=False,
        console=console,
    )
    shown = console.file.getvalue()
    assert "longer than data.max_length=100: split into " in shown
    assert shown.count("<|im_end|>⟧") == 20


def test_preview_of_a_row_that_is_not_there_is_refused(config):
    with pytest.raises(ValueError, match=r"^there is no train row number 100: 40 can be trained$"):
        preview(config(), "train", 100, 1, ids=False, console=screen())
    with pytest.raises(ValueError, match=r"^there are no eval rows: neither data\.eval nor data\.eval_fr"):
        preview(config(), "eval", 1, 1, ids=False, console=screen())


def test_preview_of_rows_that_are_all_bad_says_why(config):
    bad = config([{"instruction": "q", "output": ""}] * 3, **{"data.on_bad_row": "skip"})
    with pytest.raises(ValueError, match=r":1: .* is empty; .*; the same for all 3 rows\nmend or remove"):
        preview(bad, "train", 1, 1, ids=False, console=screen())


@pytest.mark.parametrize(
    "lengths", [[5], [1, 1000], list(range(1, 5000, 7)), [100] * 50, [10] * 99 + [100_000]]
)
@pytest.mark.parametrize("max_length", [8, 64, 2048])
def test_the_histogram_counts_every_row_once_on_the_right_side_of_the_limit(lengths, max_length):
    bars = report.histogram(np.array(lengths), max_length)
    assert sum(bar.rows for bar in bars) == len(lengths)
    assert sum(bar.rows for bar in bars if bar.over) == sum(length > max_length for length in lengths)
    assert all(a.end == b.start for a, b in pairwise(bars))
    assert len(bars) <= 2 * report.BINS + 1


def test_preview_marks_trained_tokens_with_what_the_terminal_can_show(config):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="gbk", errors="backslashreplace")
    preview(config(), "train", 1, 1, ids=False, console=Console(file=terminal, width=100, markup=False))
    terminal.flush()
    assert "[[答案0。<|im_end|>]]" in written.getvalue().decode("gbk")
    assert "trained tokens: [[like this]]" in written.getvalue().decode("gbk")
