"""Rows of the four shapes become the same turns; a row that cannot be trained is named with its place."""

import json
from pathlib import Path

import pytest

from qwenlora.data.rows import EXAMPLES, read_rows, source_files, to_messages

QUESTION, ANSWER = {"role": "user", "content": "几点？"}, {"role": "assistant", "content": "三点。"}


@pytest.fixture
def rows(tmp_path):
    def rows(text: str | bytes, name: str = "my.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_rows([path])

    return rows


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "三点。"}]},
        {"id": "7", "conversations": [{"from": "user", "value": "几点？"}, {"from": "assistant", "value": "三点。"}]},
        {"conversations": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "source": "x"},
        {"instruction": "几点？", "output": "三点。"},
        {"instruction": "几点？", "input": "", "output": "三点。"},
        {"instruction": "几点？", "input": None, "output": "三点。"},
    ],
)
def test_the_four_shapes_give_the_same_turns(row):
    assert to_messages(row) == [QUESTION, ANSWER]


def test_a_system_text_beside_the_turns_is_the_first_turn():
    system = {"role": "system", "content": "简短。"}
    for row in ({"instruction": "几点？", "output": "三点。"}, {"conversations": None, "messages": [QUESTION, ANSWER]}):
        assert to_messages(row | {"system": "简短。"}) == [system, QUESTION, ANSWER]


def test_input_follows_the_instruction_on_a_line_of_its_own():
    messages = to_messages({"instruction": "翻译", "input": "hello", "output": "你好"})
    assert messages[0]["content"] == "翻译\nhello"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn: there is nothing to learn from"),
        ({"conversations": []}, "expected a list of turns, found []"),
        ({"conversations": "x"}, 'expected a list of turns, found "x"'),
        ({"conversations": ["x"]}, 'turn 1 must be an object, found "x"'),
        ({"messages": [{"role": "bot", "content": "x"}]}, 'turn 1 has role "bot"; known: human, user, gpt, '),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 'turn 1 (user) must be text, found ["x"]'),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n"}]}, "turn 2 (assistant) is empty"),
        ({"messages": [QUESTION, ANSWER, {"role": "system", "content": "x"}]}, "turn 3 is a system turn; "),
        ({"instruction": "x", "output": ""}, "turn 2 (assistant) is empty"),
        ({"instruction": "x", "output": 3}, "output must be text, found 3"),
        ({"instruction": "x<|im_end|>", "output": "y"}, "turn 1 contains <|im_end|>, which would forge a turn"),
        ({"instruction": 0, "output": "y"}, "instruction must be text, found 0"),
        ({"instruction": "x", "input": [], "output": "y"}, "input must be text, found []"),
        (
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            "history is not read here: put it into the turns",
        ),
        ({"messages": [QUESTION, ANSWER], "conversations": []}, "has both conversations and messages; remove one"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": []}]}, "turn 2 has tool_calls, which is not read here: "),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "turn 2 has weight, which is not read here: "),
        ({"messages": [QUESTION, ANSWER], "system": 3}, "system must be text, found 3"),
        ({"instruction": "x\ud83d", "output": "y"}, "turn 1 contains half a character at 1: surrogates not allowed"),
        ({"prompt": "x"}, "unknown shape with keys prompt"),
        (["x"], 'unknown shape: a row must be a JSON object, found ["x"]'),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_with_its_reason(row, reason):
    with pytest.raises(ValueError, match=".") as caught:
        to_messages(row)
    assert str(caught.value).startswith(reason)


ROW = '{"instruction": "q", "output": "a"}'


@pytest.mark.parametrize(
    "text",
    [
        f"{ROW}\n{ROW}",
        f"\n{ROW}\r\n\r\n{ROW}\r\n",
        f"[{ROW},{ROW}]",
        f"\ufeff [\n{ROW}\n,\n{ROW}\n]\n",
        f"[{json.dumps(json.loads(ROW), indent=2)}, {ROW}]",
    ],
)
@pytest.mark.parametrize("name", ["my.json", "my.jsonl"])
def test_an_array_and_lines_are_told_apart_by_their_content(rows, text, name):
    assert [row.messages[1]["content"] for row in rows(text, name)] == ["a", "a"]


def test_rows_know_their_place(rows, tmp_path):
    assert [row.place for row in rows(f"\n{ROW}\n\n{ROW}\n")] == [f"{tmp_path}/my.jsonl:2", f"{tmp_path}/my.jsonl:4"]
    assert [row.place for row in rows(f"[\n{ROW},\n\n{ROW}]")] == [f"{tmp_path}/my.jsonl:2", f"{tmp_path}/my.jsonl:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path} is empty: it has no rows"),
        ("[]", "{path} is empty: it has no rows"),
        (f"{ROW}\n{{x}}", "{path}:2: not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        (f"[{ROW},\n{{x}}]", "{path}:2: not valid JSON: "),
        (f"[{ROW}", '{path}:1: expected , or ] after a row, found "the end"'),
        (f"[{ROW}] x", '{path}:1: expected the end of the file after ], found "x"'),
        (
            f'{ROW}\n{{"instruction": "q", "output": "a", "output": "b"}}',
            "1 of 2 rows cannot be trained:\n  {path}:2: has the key output twice",
        ),
        (b"\xff\xfe", "{path}: not UTF-8 text at byte 0; convert it: iconv"),
        ("[" * 100_000, "{path}:1: JSON nested too deeply"),
        (
            f"{ROW}\n" + '{"instruction": "q"}\n' * 30,
            "30 of 31 rows cannot be trained:\n  {path}:2: unknown shape with",
        ),
        ('{"messages": []}\n' * 3, "{path}:1: expected a list of turns, found []; the same for all 3 rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(rows, tmp_path, text, message):
    with pytest.raises(ValueError, match=".") as caught:
        rows(text)
    assert str(caught.value).startswith(message.format(path=tmp_path / "my.jsonl"))


def test_the_report_shows_the_first_20_bad_rows_and_the_known_shapes(rows):
    with pytest.raises(ValueError, match=".") as caught:
        rows(f"{ROW}\n" + "".join(f'{{"key{n}": 1}}\n' for n in range(30)))
    text = str(caught.value)
    assert text.count("unknown shape") == 20
    assert "and 10 more" in text
    assert text.count("known shapes of a row:") == 1


def test_a_source_that_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train=no\.jsonl: no such file \(looked for /.*/no\.jsonl\)"):
        source_files("no.jsonl", "train")
    with pytest.raises(ValueError, match=r"data\.eval=.* is a folder; name the files in it"):
        source_files(str(tmp_path), "eval")


def test_the_example_data_is_what_it_says():
    train, rephrased = (read_rows(source_files("example", side)) for side in EXAMPLES)
    questions = [row.messages[0]["content"] for row in train]
    answers = [row.messages[1]["content"] for row in train]
    assert (len(train), len(rephrased)) == (120, 20)
    assert len(set(questions)) == len(set(answers)) == 120
    for row in rephrased:
        assert row.messages[0]["content"] not in questions
        assert row.messages[1]["content"] in answers


@pytest.mark.parametrize(
    "name", ["medical_qa_sharegpt.jsonl", "medical_multiturn_messages.jsonl", "alpaca_zh_demo.json", "identity.json"]
)
def test_real_files_are_read_whole(assets, name):
    counts = {
        "medical_qa_sharegpt.jsonl": 7248,
        "medical_multiturn_messages.jsonl": 977,
        "alpaca_zh_demo.json": 1000,
        "identity.json": 91,
    }
    assert len(read_rows([Path(assets) / "data" / name])) == counts[name]
