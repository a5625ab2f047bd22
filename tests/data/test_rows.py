"""Rows of every shape become the turns that are meant; an error for an unknown key or role shows the line to
write."""

import json
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import given, settings
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
        [QUESTION, ANSWER],
        {"conversation": [{"human": "几点？", "assistant": "三点。"}]},
        {"conversation": [{"assistant": "三点。", "human": "几点？", "system": ""}]},
        {"messages": [{"input": "几点？", "output": "三点。"}]},
        {"messages": [{"query": "几点？", "response": "三点。", "time": None}]},
        {"messages": [{"user": "几点？"}, {"gpt": "三点。"}]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "几点？", "completion": [ANSWER]},
        {"prompt": QUESTION, "completion": {"from": "gpt", "value": "三点。"}},
        {"instruction": [{"from": "human", "value": "几点？"}], "output": "三点。", "input": ""},
        {"messages": [QUESTION | {"content": [{"type": "text", "text": "几点"}, "？"]}, ANSWER]},
        {"messages": [QUESTION, ANSWER | {"content": [{"text": "三"}, {"type": "text", "value": "点。"}]}]},
        {"messages": [QUESTION, ANSWER], "label": True, "kto_tag": "true"},
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


def test_json_in_a_text_in_a_text_is_decoded_too():
    row = json.loads(json.dumps(OPENAI))
    function = row["messages"][2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    row["tools"] = json.dumps(json.dumps(row["tools"]))
    assert read(row) == read(OPENAI)


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
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"prompt": [QUESTION], "chosen": ANSWER, "rejected": ANSWER},
        {"prompt": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {
            "chosen": [QUESTION, ANSWER],
            "rejected": [QUESTION, ANSWER],
            "score_chosen": 7.5,
            "messages": [ANSWER],
        },
        {"conversations": [QUESTION], "chosen": ANSWER, "rejected": ANSWER},
        {"conversations": [QUESTION], "chosen": "三点。", "rejected": "四点。", "prompt": "几点？"},
        {"messages": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"question": "几点？", "chosen": "三点。", "rejected": "四点。"},
        {"question": "几点？", "response_chosen": "三点。", "response_rejected": "四点。", "system": "短"},
        {"instruction": "几点？", "input": "", "chosen": "三点。", "rejected": "四点。"},
        {"chosen_messages": [QUESTION, ANSWER], "rejected_messages": [QUESTION, ANSWER]},
        {"query": "几点？", "response": "三点。", "rejected_response": "四点。"},
        {"instruct": "几点？", "input": "", "output": "三点。"},
        {"toy_system": "短", "toy_input": "几点？", "toy_output": "三点。"},
        {"messages": [{"toy_system": "短", "toy_input": "几点？", "toy_output": "三点。"}]},
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


PREFERENCES = [
    {"prompt": "几点？", "chosen": "三点。", "rejected": "四点。"},
    {"conversations": [QUESTION], "chosen": ANSWER, "rejected": ANSWER},
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER], "prompt": "几点？"},
    {"question": "几点？", "response_chosen": "三点。", "response_rejected": "四点。"},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_one_line_learns_the_chosen_replies_beside_what_the_config_says_already(row):
    theirs = {f"my_{key}": value for key, value in row.items()}
    columns = {f"my_{key}": key for key in row}
    message = reason(theirs, columns=columns)
    assert "to learn the chosen replies alone, write data.columns: {my_" in message
    assert read(theirs, columns=config_of(message)[1]).messages == [QUESTION, ANSWER]


def test_of_labelled_rows_the_good_ones_alone_are_learnt(tmp_path):
    rows = [{"prompt": "几点？", "completion": f"{hour}点。", "label": hour == 3} for hour in range(6)]
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="5 of 6 rows"):
        survey(Data(train=str(path)))
    data = Data(train=str(path), on_bad_row="skip")
    assert survey(data) == (1, 0, 5, [])
    assert [row.messages[1]["content"] for _, row in rows_of_side(data, "train")] == ["3点。"]


spoken = st.text(alphabet='三点a <>{}[]"', min_size=1, max_size=6)


@given(talk=st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3), system=st.none() | spoken)
@settings(max_examples=100, deadline=None)
def test_a_talk_is_the_same_in_every_form(talk, system):
    turns = [
        {"role": role, "content": text}
        for pair in talk
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    parts = [
        turn | {"content": [{"type": "text", "text": text} for text in turn["content"]]} for turn in turns
    ]
    pairs = [{"human": question, "assistant": answer} for question, answer in talk]
    last = {"instruction": talk[-1][0], "output": talk[-1][1], "history": list(map(list, talk[:-1]))}
    forms: list[Any] = [{"messages": turns}, {"messages": parts}, {"conversation": pairs}, last]
    forms.append({"prompt": turns[:-1], "completion": turns[-1:]})
    if system is not None:
        forms = [form | {"system": system} for form in forms]
        turns = [{"role": "system", "content": system}, *turns]
        forms += [{"messages": turns}, {"prompt": turns[:-1], "completion": turns[-1]["content"]}]
    forms.append(turns)

    def outcome(form: Any) -> Any:
        try:
            messages = read(form).messages
        except BadRow as error:
            return str(error)
        return [{key: turn[key] for key in ("role", "content")} for turn in messages]  # a prompt's are masked

    outcomes = [outcome(form) for form in forms]
    assert all(found == outcomes[0] for found in outcomes)


@pytest.mark.parametrize("completion", ["三点。", ANSWER, [ANSWER]])
def test_replies_in_a_prompt_are_not_trained(completion):
    earlier = {"role": "assistant", "content": "您好！"}
    row = {"prompt": [QUESTION, earlier | {"weight": 1}, QUESTION], "completion": completion}
    assert read(row).messages == [QUESTION, earlier | {"weight": 0.0}, QUESTION, ANSWER]


def test_pairs_of_roles_are_turns_in_the_order_of_a_talk():
    pairs = [
        {"assistant": "a", "system": "s", "human": "q", "id": 1},
        {"human": "r", "assistant": "b", "reasoning_content": "t"},
    ]
    assert read({"conversation": pairs}).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b", "reasoning_content": "t"},
    ]
    swapped = read(
        {"conversation": [{"human": "a", "gpt": "q"}]}, roles={"human": "assistant", "gpt": "user"}
    )
    assert [message["role"] for message in swapped.messages] == ["user", "assistant"]


def test_parts_of_a_turn_are_its_thought_its_text_and_its_calls():
    parts = [
        {"type": "reasoning", "value": "要看钟"},
        {"type": "text", "text": "看一下。"},
        *({"type": "tool_call", "value": json.dumps(CALL["function"])} for _ in range(2)),
    ]
    assert read({"messages": [QUESTION, {"role": "assistant", "content": parts}]}).messages[1] == {
        "role": "assistant",
        "content": "看一下。",
        "reasoning_content": "要看钟",
        "tool_calls": [CALL, CALL],
    }


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "q"}],
            'of type "image_url"',
        ),
        ([{"image": "x.png"}], 'a part {"image": "x.png"}, and only text is read'),
        ([{"text": "q", "image": "x.png"}], "a part with image, and only text is read"),
        (
            [{"type": "text", "text": "a", "weight": 0}, {"type": "text", "text": "b"}],
            "a part with weight, and only text is read here, of which all is trained alike",
        ),
        ([{"type": "thinking", "thinking": "a", "train": False}], "a part with train"),
        ([3], "a part 3, and only text is read here; leave such rows out: data.on_bad_row: skip"),
        ([{"type": "text", "text": 3}], "a part without text"),
        ([{"type": "text"}], "a part without text"),
        ([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}], '"thinking" after others'),
    ],
)
def test_other_parts_are_refused_by_their_type(parts, words):
    assert words in reason({"messages": [QUESTION, {"role": "assistant", "content": parts}]})


def test_tools_are_as_openai_clients_send_them():
    function = TOOL["function"]
    schema = {"name": "clock", "description": "时间", "input_schema": {"type": "object"}}
    for tool in (TOOL, function, {"function": function}, {"type": "function", **function}, schema):
        row = {"messages": [QUESTION, ANSWER], "tools": [tool]}
        assert json.dumps(read(row).tools) == json.dumps([TOOL])
        assert json.dumps(read(row | {"tools": json.dumps([tool])}).tools) == json.dumps([TOOL])
    assert read({"messages": [QUESTION, ANSWER], "functions": [function]}).tools == [TOOL]
    assert read({"messages": [QUESTION, ANSWER], "tools": [{"type": "web_search"}]}).tools == [
        {"type": "web_search"}
    ]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "meta_instruction"])
def test_a_system_text_has_several_names(key):
    system = {"role": "system", "content": "简短。"}
    assert read({"messages": [QUESTION, ANSWER], key: "简短。"}).messages == [system, QUESTION, ANSWER]
    assert read({"instruction": "几点？", "output": "三点。", key: "简短。"}).messages[0] == system
    assert read({"messages": [system, QUESTION, ANSWER], key: "简短。"}).messages == [
        system,
        QUESTION,
        ANSWER,
    ]
    assert "ignore the text: data.columns: {" in reason({"messages": [system, QUESTION, ANSWER], key: "长。"})


IMAGE_MARKS = [
    "<image>这是什么？",
    "这是什么？\n<image>",
    "<video>\n这是什么？",
    "<audio>这是什么？",
    "a <|vision_start|><|image_pad|><|vision_end|> b",
    "a <img>https://x.org/1.jpg</img> b",
    "a <IMG_CONTEXT> b",
    "a <|AUDIO|> b",
]


@pytest.mark.parametrize("text", IMAGE_MARKS)
@pytest.mark.parametrize("more", [{}, {"images": None}])
def test_the_mark_of_an_image_that_is_not_there_is_refused(text, more):
    message = reason({"messages": [QUESTION | {"content": text}, ANSWER], **more})
    assert message.startswith("turn 1 (user) holds <")
    assert "leave such rows out: data.on_bad_row: skip" in message


@pytest.mark.parametrize(
    "text",
    ["怎么用<video>标签？", "<video>\n<source src='a'>\n</video> 对吗？", "a < b <image", "<img src='x'>"],
)
def test_html_is_no_image(text):
    assert read({"messages": [QUESTION | {"content": text}, ANSWER]}).messages[0]["content"] == text
    assert read({"messages": [QUESTION, ANSWER | {"content": "<image>" + text}]}).messages[1]["content"]


def test_placeholders_that_nobody_filled_in_are_said(tmp_path):
    path = tmp_path / "my.jsonl"
    rows = [
        {"instruction": "你是谁？", "output": "我是{{name}}，来自{{ author }}。"},
        {"instruction": "x^{{2}} {{a.b}} {{", "output": "}}"},
        {"instruction": "{{name}}", "output": "在。"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (note,) = survey(Data(train=str(path))).notes
    assert note.startswith(f"2 rows hold {{{{name}}}}, {{{{ author }}}} (the first: {path}:1); if these are")


def test_a_role_that_is_guessed_is_likely():
    roles = {
        "Bot": "assistant",
        "USER": "user",
        "sys": "system",
        "tool_call": "function_call",
        "function": "tool",
    }
    for theirs, ours in roles.items():
        assert f"data.roles: {{{theirs}: {ours}}}" in reason({"messages": [{"role": theirs, "content": "x"}]})
    turns = [{"role": "甲", "content": "x"}, {"role": "乙", "content": "x"}]
    assert "data.roles: {甲: user, 乙: assistant}" in reason({"messages": turns})
    assert "data.roles: {甲: user, 乙: assistant}" in reason({"messages": turns}, roles={"甲": "user"})


def test_keys_that_are_not_used_are_named_at_once():
    row = {"messages": SAID, "images": ["x.png"], "audio": "x.mp3"}
    assert reason(row) == (
        "has images and audio, which qwenlora does not use; ignore them: data.columns: {images: null,"
        " audio: null}"
    )
    turns = [QUESTION, {**ANSWER, "loss_scale": 1, "reasoning": "so"}]
    assert reason({"messages": turns}) == (
        "turn 2 has loss_scale and reasoning, which qwenlora does not use; read loss_scale and reasoning as"
        " weight and reasoning_content: data.columns: {loss_scale: weight, reasoning: reasoning_content}, or"
        " ignore them: data.columns: {loss_scale: null, reasoning: null}"
    )


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
            {"messages": SAID, "system_prompt": "s", "system": "t"},
            "has system and system_prompt; ignore one: data.columns: {system_prompt: null}",
        ),
        ({"messages": SAID, "image": "x.png"}, "has image, which qwenlora does not use"),
        ({"prompt": SAID, "completion": "c", "input": "i"}, "has turns in prompt, and input"),
        ({"messages": SAID, "label": False}, "has a bad reply, by its label for KTO (label: false)"),
        ({"messages": SAID, "kto_tag": "False"}, "data.on_bad_row: skip, or if it is no such label"),
        ({"messages": SAID, "kto_tag": 0}, "has a bad reply, by its label for KTO (kto_tag: 0)"),
        (
            {"messages": SAID, "loss_mask": [0, 1]},
            "has loss_mask, which qwenlora does not use; read it as wei",
        ),
        ({"query": "q", "response": "a", "train": False}, "has train, which qwenlora does not use"),
        ({"messages": SAID, "mask": [0, 1]}, "has mask, which qwenlora does not use; ignore it"),
        ({"text": "a cat", "image": "x.png"}, "has image, which qwenlora does not use"),
        ({"messages": SAID, "tools": [{"parameters": {}}]}, "a tool must be {"),
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
