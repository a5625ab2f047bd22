"""Rows of every shape become the turns that are meant; an error for an unknown key or role shows the line to
write."""

import json
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.row_io import read_chunks
from qwenlora.data.rows import Row, to_row
from qwenlora.data.shapes import KEYS, PAIRS, TURN_LISTS, RowOptions, shape_of
from qwenlora.data.survey import rows_of_side, survey
from qwenlora.data.turns import ROLES

QUESTION, ANSWER = {"role": "user", "content": "几点？"}, {"role": "assistant", "content": "三点。"}
TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "时间", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Asia/Shanghai"}}}


def read(row: Any, **options: Any) -> Row:
    return to_row(1, row, shape_of(row, RowOptions(**options)), RowOptions(**options))


def reason(row: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        read(row, **options)
    return str(caught.value)


def config_of(message: str) -> tuple[str, Any]:
    """Return the name and value that a message says to write into the config, as YAML reads it."""
    name, line = message.rpartition("data.")[2].split(": ", 1)
    return name, yaml.safe_load(line)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "三点。"}]},
        {
            "id": "7",
            "conversations": [{"from": "user", "value": "几点？"}, {"from": "assistant", "value": "三点。"}],
        },
        *({key: [QUESTION, ANSWER]} for key in TURN_LISTS),
        {"messages": [QUESTION, ANSWER], "source": "x", "conversations": None},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {
            "messages": [
                {**QUESTION, "from": None, "value": None},
                {**ANSWER, "tool_calls": None, "weight": None},
            ]
        },
        {"messages": [QUESTION, ANSWER], "instruction": None, "output": None, "system": None, "tools": None},
        {"messages": [QUESTION, ANSWER], "text": "几点？三点。"},
        {"instruction": "几点？", "output": "三点。"},
        {"instruction": "几点？", "input": "", "output": "三点。", "system": "", "history": []},
        {"instruction": "几点？", "input": None, "output": "三点。", "history": None},
        {"instruction": "", "input": "几点？", "output": "\n\n三点。"},
        {"query": "几点？", "response": "三点。"},
        {"prompt": "几点？", "completion": "三点。"},
    ],
)
def test_the_shapes_of_a_question_and_its_answer_give_the_same_turns(row):
    assert read(row) == Row(1, [QUESTION, ANSWER])


SHAREGPT = {
    "system": "简短。",
    "conversations": [
        {"from": "human", "value": "几点？"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "Asia/Shanghai"}}'},
        {"from": "observation", "value": "15:00"},
        {"from": "gpt", "value": "三点。"},
    ],
    "tools": json.dumps([TOOL]),
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "简短。"},
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": CALL["function"] | {"arguments": '{"zone": "Asia/Shanghai"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "15:00"},
        ANSWER,
    ],
    "tools": [TOOL],
}


@pytest.mark.parametrize(
    ("shape", "rows"),
    {
        "chat, sharegpt": [
            SHAREGPT,
            {"conversations": SHAREGPT["conversations"][::3]},
            SHAREGPT | {"tools": ""},
        ],
        "chat, with tools": [
            OPENAI,
            {"messages": [QUESTION, ANSWER]},
            {"messages": [QUESTION, ANSWER], "functions": [TOOL]},
        ],
        "alpaca": [
            {"instruction": "翻译", "input": "hello", "output": "你好"},
            {"instruction": "几点？", "input": "", "output": "三点。", "system": "简短。"},
            {"instruction": "几点？", "output": "三点。", "history": [["在？", "在。"]]},
        ],
        "query_response": [
            {"query": "几点？", "response": "三点。"},
            {"query": "几点？", "response": "三点。", "history": [["在？", "在。"]]},
            {"query": "几点？", "response": "三点。", "system": "简短。"},
        ],
        "prompt_completion": [{"prompt": f"{n}", "completion": "三点。"} for n in range(3)],
        "text": [{"text": "人之初，"}, {"text": "性本善。"}, {"text": "性相近，", "meta": {"source": "x"}}],
    }.items(),
)
def test_a_file_of_each_shape_is_known_by_its_rows(tmp_path, shape, rows):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert survey(Data(train=str(path))) == (3, 0, 0, [])
    assert [shape_of(row, RowOptions()) for row in rows] == [shape.partition(",")[0]] * 3
    assert survey(Data(train=str(path), format=shape.partition(",")[0])) == (3, 0, 0, [])
    places = [place for place, _ in rows_of_side(Data(train=str(path)), "train")]
    assert places == [f"{path}:{line}" for line in (1, 2, 3)]


def test_a_system_text_beside_the_turns_is_the_first_turn():
    system = {"role": "system", "content": "简短。"}
    for row in (
        {"instruction": "几点？", "output": "三点。"},
        {"conversations": None, "messages": [QUESTION, ANSWER]},
    ):
        assert read(row | {"system": "简短。"}).messages == [system, QUESTION, ANSWER]


def test_input_follows_the_instruction_on_a_line_of_its_own():
    row = read({"instruction": "翻译", "input": "hello", "output": "你好"})
    assert row.messages[0]["content"] == "翻译\nhello"


@pytest.mark.parametrize("history", [[["在？", "在。"]], '[["在？", "在。"]]', [("在？", "在。")]])
def test_history_comes_before_the_question(history):
    before = [{"role": "user", "content": "在？"}, {"role": "assistant", "content": "在。"}]
    row = {"instruction": "几点？", "output": "三点。", "history": history, "system": "简短。"}
    assert read(row).messages == [{"role": "system", "content": "简短。"}, *before, QUESTION, ANSWER]


def test_plain_text_has_no_turns_and_may_hold_any_mark():
    assert read({"text": " 人之初，<|im_end|>"}) == Row(1, [], None, " 人之初，<|im_end|>")


def test_tool_calls_are_objects_however_they_are_written():
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    expected = [
        {"role": "system", "content": "简短。"},
        QUESTION,
        called,
        {"role": "tool", "content": "15:00"},
        ANSWER,
    ]
    for row in (SHAREGPT, OPENAI):
        assert read(row).messages == expected
        assert read(row).tools == [TOOL]
    assert read(SHAREGPT).digest == read(OPENAI).digest


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function_call", "content": [CALL["function"]]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ],
)
def test_a_call_may_be_written_in_many_ways(turn):
    assert read({"messages": [QUESTION, turn]}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


def test_a_call_keeps_what_is_said_and_thought_beside_it():
    turn = {
        "role": "assistant",
        "content": "\n看一下。",
        "reasoning_content": "要看钟",
        "tool_calls": [CALL, CALL],
    }
    assert read({"messages": [QUESTION, turn]}).messages[1] == turn | {"content": "看一下。"}


def test_a_call_without_arguments_has_none():
    turn = {"role": "assistant", "tool_calls": [{"name": "clock"}]}
    (call,) = read({"messages": [QUESTION, turn]}).messages[1]["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": {}}


def test_a_call_may_have_null_where_it_has_nothing():
    for call in (
        {"name": "clock", "arguments": None},
        {"name": "clock", "arguments": {}, "function": None},
        {"type": None, "function": {"name": "clock", "arguments": {}, "parameters": None}},
    ):
        (found,) = read({"messages": [QUESTION, {"role": "function_call", "content": call}]}).messages[1][
            "tool_calls"
        ]
        assert found["function"] == {"name": "clock", "arguments": {}}


TEXT = {"type": "string"}
NULLABLE = [
    {"type": ["string", "null"]},
    {"type": "string", "nullable": True},
    {"anyOf": [TEXT, {"type": "null"}], "default": None},
    {"oneOf": [TEXT, {"type": "null"}]},
    {"enum": ["x", None]},
    {"$ref": "#/$defs/Perhaps"},
]
DEFINITIONS = {"$defs": {"Perhaps": {"anyOf": [TEXT, {"type": "null"}]}}}


def called(arguments: object, schema: dict) -> tuple[object, list]:
    """Return a row's arguments and tools. schema: of the argument y."""
    parameters = {"type": "object", "properties": {"x": TEXT, "y": schema}} | DEFINITIONS
    row = read(
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
            "messages": [
                QUESTION,
                {"role": "function_call", "content": {"name": "f", "arguments": arguments}},
            ],
        }
    )
    return row.messages[1]["tool_calls"][0]["function"]["arguments"], row.tools


@pytest.mark.parametrize(
    "schema", [TEXT, {}, {"type": "string", "default": None}, {"type": "string", "enum": None}]
)
@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_null_arguments_and_null_keys_of_tools_are_left_out(schema, write):
    arguments, tools = called(
        write({"x": "1", "y": None, "z": {"w": None}, "l": [None, {"v": None}]}), schema
    )
    assert arguments == {"x": "1", "z": {}, "l": [None, {}]}
    assert tools[0]["function"]["parameters"]["properties"]["y"] in ({}, TEXT)


@pytest.mark.parametrize("schema", NULLABLE)
def test_a_null_argument_stays_where_the_schema_says_null(schema):
    arguments, tools = called({"x": None, "y": None}, schema)
    assert arguments == {"y": None}
    assert tools[0]["function"]["parameters"]["properties"]["y"] == schema
    for nested, value in (
        ({"type": "object", "properties": {"z": schema}}, {"z": None, "w": None}),
        ({"anyOf": [{"type": "object", "properties": {"z": schema}}]}, {"z": None, "w": None}),
        ({"type": "object", "additionalProperties": schema}, {"z": None}),
        ({"type": "object", "required": ["z"]}, {"z": None, "w": None}),
        ({"type": "array", "items": {"properties": {"z": schema}}}, [{"z": None, "w": None}]),
    ):
        kept = [{"z": None}] if isinstance(value, list) else {"z": None}
        assert called({"y": value}, nested)[0] == {"y": kept}


@pytest.mark.parametrize(
    "schema", [[], "x", {"anyOf": 3, "required": True, "$ref": "#/$defs/none", "properties": 7}]
)
def test_an_odd_schema_is_no_traceback(schema):
    assert called({"y": {"z": None}}, schema)[0] == {"y": {}}


names = st.sampled_from(["a", "b", "c"])
functions = st.dictionaries(names, st.dictionaries(names, st.text(max_size=3), min_size=1), min_size=1)


@given(made=st.lists(functions, min_size=1, max_size=3))
def test_what_arrow_pads_means_the_same_in_parquet_and_as_exported_json(made, tmp_path_factory):
    """Each row has some functions, and calls each of them; Arrow gives all of them the keys of any."""
    rows = [
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": name, "parameters": {"properties": dict.fromkeys(keys, TEXT)}},
                }
                for name, keys in its.items()
            ],
            "messages": [
                {**QUESTION, "tool_calls": None},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"function": {"name": name, "arguments": keys}} for name, keys in its.items()
                    ],
                },
            ],
        }
        for its in made
    ]
    table = pyarrow.Table.from_pylist(rows)
    file = tmp_path_factory.getbasetemp() / "padded.parquet"
    parquet.write_table(table, file)
    from_parquet = [value for chunk in read_chunks(file) for _, value in chunk.values()]
    for found in (table.to_pylist(), from_parquet):
        assert list(map(read, found)) == list(map(read, rows))


def test_rows_that_say_the_same_have_one_digest():
    digests = {
        read(row).digest
        for row in ({"messages": [QUESTION, ANSWER]}, {"output": "三点。", "instruction": "几点？", "id": 3})
    }
    assert len(digests) == 1
    for row in ({"text": "几点？"}, {"messages": [QUESTION, ANSWER], "tools": [TOOL]}, SHAREGPT):
        digests.add(read(row).digest)
    assert len(digests) == 4


def test_columns_bring_other_names_to_ours():
    expected = [QUESTION, ANSWER]
    pair = {"question": "几点？", "answer": "三点。", "input": "not said"}
    assert (
        read(pair, columns={"question": "instruction", "answer": "output", "input": None}).messages
        == expected
    )
    turns = [{"speaker": "user", "text": "几点？"}, {"speaker": "assistant", "text": "三点。"}]
    columns = {"dialog_list": "messages", "speaker": "role", "text": "content"}
    assert read({"dialog_list": turns}, columns=columns).messages == expected
    chosen = {"prompt": "几点？", "chosen": "三点。", "rejected": "四点。"}
    assert read(chosen, columns={"chosen": "completion", "rejected": None}).messages == expected
    assert read({"content": "x"}, columns={"content": "text"}).text == "x"
    assert (
        read({"a": "几点？", "query": None, "response": "三点。"}, columns={"a": "query"}).messages
        == expected
    )


def test_roles_bring_other_names_to_ours():
    turns = [{"role": "病人", "content": "几点？"}, {"role": "医生", "content": "三点。"}]
    assert read({"messages": turns}, roles={"病人": "user", "医生": "assistant"}).messages == [
        QUESTION,
        ANSWER,
    ]
    turns = [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "三点。"}]
    assert (
        read({"messages": turns}, roles={"gpt": "user", "human": "assistant"}).messages[0]["role"]
        == "assistant"
    )
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    assert read({"messages": [QUESTION, call]}, roles={"tool_call": "function_call"}).messages[1][
        "tool_calls"
    ] == [CALL]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "几点？", "answer": "三点。"},
        {"id": "7", "Question": "几点？", "Answer": "三点。"},
        {"instruction": "几点？", "answer": "三点。"},
        {"问": "几点？", "答": "三点。"},
        {"the question": "几点？", "on": "三点。"},
        {"query": "几点？", "reply": "三点。", "score": 3},
        {"turns": [QUESTION, ANSWER]},
        {"prompt": "几点？", "chosen": "三点。", "rejected": "四点。"},
        {"query": "几点？", "chosen": "三点。", "rejected": "四点。"},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER], "prompt": "几点？"},
        {"messages": [QUESTION, ANSWER], "chosen": "x", "rejected": "y"},
        {"instruction": "几点？", "output": "三点。", "kto_tag": True},
        {"messages": [{"role": "User", "content": "几点？"}, ANSWER]},
        {"messages": [{"role": "病人", "content": "几点？"}, ANSWER]},
        {"messages": [QUESTION, {"role": "a #b", "content": "三点。"}]},
        {"messages": [QUESTION, {"role": "yes", "content": "三点。"}]},
        {"messages": [QUESTION, ANSWER | {"weight": 1}]},
        {"conversations": [QUESTION, ANSWER], "messages": [QUESTION]},
        {"messages": [{"who": "user", "say": "几点？"}, {"who": "assistant", "say": "三点。"}]},
        {"messages": [QUESTION | {"from": "x", "value": "y"}, ANSWER]},
        {"instruction": "几点？", "output": "三点。", "messages": [QUESTION, ANSWER]},
    ],
)
def test_what_an_error_says_to_write_makes_the_row_read(row):
    options: dict[str, Any] = {}
    for _ in range(4):  # a row may want several lines, one after the other
        try:
            read(row, **options)
        except ValueError as error:
            name, value = config_of(str(error))
            options[name] = options.get(name, {}) | value if isinstance(value, dict) else value
    found = read(row, **options)
    Data(train="my.jsonl", **options)
    assert found.messages[-2:] == [QUESTION, ANSWER]


def test_a_role_that_is_guessed_is_likely():
    roles = {
        "Bot": "assistant",
        "USER": "user",
        "developer": "system",
        "tool_call": "function_call",
        "function": "tool",
    }
    for theirs, ours in roles.items():
        assert f"data.roles: {{{theirs}: {ours}}}" in reason({"messages": [{"role": theirs, "content": "x"}]})
    turns = [{"role": "甲", "content": "x"}, {"role": "乙", "content": "x"}]
    assert "data.roles: {甲: user}" in reason({"messages": turns})
    assert "data.roles: {甲: user, 乙: assistant}" in reason({"messages": turns}, roles={"甲": "user"})


def test_a_row_of_two_shapes_is_read_as_the_one_asked_for():
    both = {"messages": [QUESTION, ANSWER], "instruction": "q", "output": "a", "text": "x"}
    assert reason(both) == "is chat and alpaca at once; choose one: data.format: chat"
    assert read(both, format="chat").messages == [QUESTION, ANSWER]
    assert read(both, format="alpaca").messages[0]["content"] == "q"
    assert read(both, format="text").text == "x"
    assert reason(both, format="query_response").startswith(
        "is chat and alpaca, data.format=query_response is asked for"
    )


def test_a_row_of_another_shape_than_its_file_is_named():
    with pytest.raises(ValueError, match="is text, the rows before it are chat; one file, one shape"):
        to_row(7, {"text": "x"}, "chat", RowOptions())


def test_every_name_that_columns_may_have_is_read():
    assert {"system", "tools", "input", "history", "text", "role", "content", "from", "value"} < set(KEYS)
    assert {key for pair in PAIRS.values() for key in pair} < set(KEYS)
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool", "function_call"}


def test_the_example_data_is_what_it_says():
    data = Data(train="example", eval="example")
    train, rephrased = ([row.messages for _, row in rows_of_side(data, side)] for side in ("train", "eval"))
    questions, answers = [{messages[n]["content"] for messages in train} for n in (0, 1)]
    assert (len(train), len(rephrased)) == (120, 20)
    assert len(questions) == len(answers) == 120
    assert not any(messages[0]["content"] in questions for messages in rephrased)
    assert all(messages[1]["content"] in answers for messages in rephrased)


@pytest.mark.parametrize(
    ("name", "rows"),
    {
        "medical_qa_sharegpt.jsonl": (7248, 0),
        "medical_qa_alpaca.jsonl": (7248, 0),
        "medical_multiturn_messages.jsonl": (977, 0),
        "smilechat_messages_2k.jsonl": (1996, 4),
        "alpaca_zh_demo.json": (1000, 0),
        "identity.json": (91, 0),
    }.items(),
)
def test_real_files_are_read_whole(assets, name, rows):
    counts = survey(Data(train=str(assets / "data" / name), on_bad_row="skip"))
    assert (counts.train, counts.bad) == rows


def test_a_hint_keeps_what_is_set_already():
    turns = [{"role": "patient", "content": "q"}, {"role": "bot", "content": "a"}]
    with pytest.raises(BadRow, match=r"write data\.roles: \{patient: user, bot: assistant\}"):
        to_row(1, {"messages": turns}, "chat", RowOptions(roles={"patient": "user"}))
    with pytest.raises(BadRow, match=r"write data\.columns: \{frage: instruction, antwort: output\}"):
        shape_of({"frage": "q", "antwort": "a"}, RowOptions(columns={"frage": "instruction"}))


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            {"messages": [SAID[0], SAID[1] | {"mask": 0}]},
            "turn 2 has mask, which qwenlora does not use",
        ),
        (
            {"messages": [SAID[0], SAID[1] | {"loss_scale": 2}]},
            "read it as weight: data.columns: {loss_scale: weight}, or",
        ),
        (
            {"messages": [SAID[0], SAID[1] | {"thinking": "t"}]},
            "data.columns: {thinking: reasoning_content}, or",
        ),
        ({"messages": SAID, "images": ["x.png"]}, "has images, which qwenlora does not use"),
        (
            {"messages": SAID, "system_prompt": "s"},
            "read it as system: data.columns: {system_prompt: system}, or",
        ),
        ({"messages": SAID, "history": [["a", "b"]]}, "has turns and a history; put it into the turns"),
        ({"messages": SAID, "tools": [{}], "functions": [{}]}, "has tools and functions; ignore one"),
        ({"query": "q", "response": "a", "rejected_response": "b"}, "is preference data (rejected_response)"),
        (
            {"messages": [SAID[0], CALLING | {"function_call": {"name": "g"}}]},
            "tool_calls and function_call; ignore one",
        ),
        (
            {
                "messages": [
                    SAID[0],
                    {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
                ]
            },
            "a call has no arguments, but parameters; call it arguments",
        ),
    ],
)
def test_what_would_change_a_rows_meaning_and_is_not_used_is_refused(value, reason):
    with pytest.raises(BadRow, match=".") as caught:
        to_row(1, value, shape_of(value, RowOptions()), RowOptions())
    assert reason in str(caught.value)
