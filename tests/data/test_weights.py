"""Weights of turns and rows: 0 masks a reply, 1 trains it, other numbers weigh its loss."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qwenlora.adapter.answers import question_of
from qwenlora.configs import load_config
from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.prepared import prepare
from qwenlora.data.rows import Row, to_row
from qwenlora.data.shapes import RowOptions, shape_of
from qwenlora.data.weights import OF_TURNS
from qwenlora.trainer.data_check import check, preview

USER, REPLY = {"role": "user", "content": "几点开门？"}, {"role": "assistant", "content": "上午九点。"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
numbers = st.sampled_from([0, 1, False, True, 0.0, 1.0, 0.5, 3]) | st.floats(1e-18, 1e18)


@st.composite
def weighted_rows(draw, weights=numbers):
    """Return a row of several replies, each perhaps with a weight, and the weights that it means."""
    turns, meant = [], []
    for number in range(draw(st.integers(1, 4))):
        weight = draw(st.none() | weights)
        key = draw(st.sampled_from(OF_TURNS))
        turns += [USER | draw(st.sampled_from([{}, {key: 0}, {key: False}, {key: None}]))]
        turns += [{"role": "assistant", "content": f"答{number}"} | ({} if weight is None else {key: weight})]
        meant.append(1.0 if weight is None else float(weight))
    of_row = draw(st.none() | weights.filter(bool))
    row = {"messages": turns} | ({} if of_row is None else {"weight": of_row})
    return row, [weight * float(1 if of_row is None else of_row) for weight in meant]


def read(row: dict, **columns) -> Row:
    options = RowOptions(columns=columns)
    return to_row(1, row, shape_of(row, options), options)


def without_weights(row: dict) -> dict:
    turns = [{key: turn[key] for key in ("role", "content")} for turn in row["messages"]]
    return {"messages": turns}


def expected(encoder: Encoder, row: dict, weights: list[float]) -> Tokens:
    """Return the tokens of a row without weights, and in them each reply's weight."""
    (plain,) = encoder.encode([read(without_weights(row))])
    borders = np.flatnonzero(np.diff(plain.trained.astype(int))) + 1
    starts, ends = borders[::2], np.append(borders, len(plain.ids))[1::2]
    assert len(starts) == len(weights)
    of_tokens = np.zeros(len(plain.ids), np.float32)
    for start, end, weight in zip(starts, ends, weights, strict=True):
        of_tokens[start:end] = weight
    return Tokens(plain.ids, of_tokens > 0, of_tokens)


@settings(max_examples=60)
@given(weighted=weighted_rows())
def test_each_reply_has_the_weight_of_its_turn_times_its_rows(tokenizers, weighted):
    row, weights = weighted
    encoder = Encoder(tokenizers["tiny"])
    if not any(weights):
        with pytest.raises(BadRow, match="each reply has weight 0: there is nothing to learn from"):
            read(row)
        return
    (tokens,), wanted = encoder.encode([read(row)]), expected(encoder, row, weights)
    assert tokens.ids.tolist() == wanted.ids.tolist(), "weights never change the tokens"
    assert tokens.trained.tolist() == wanted.trained.tolist()
    assert tokens.given_weights().tolist() == wanted.weights.tolist()
    assert (tokens.weights is None) == set(weights).issubset({0, 1})


@settings(max_examples=20)
@given(rows=st.lists(weighted_rows(), min_size=1, max_size=6))
def test_weights_are_stored_as_the_rows_have_them_and_only_if_needed(tokenizers, tmp_path_factory, rows):
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return
    folder, encoder = tmp_path_factory.mktemp("weights"), Encoder(tokenizers["tiny"])
    files = [folder / f"{number}.jsonl" for number in range(len(rows))]  # a chunk each
    for file, (row, _) in zip(files, rows, strict=True):
        file.write_text(json.dumps(row))
    made = prepare(Data(train=[str(file) for file in files]), tokenizers["tiny"], folder / "cache")
    side, wanted = made.side("train"), [expected(encoder, *row) for row in rows]
    assert side.trained.tolist() == np.concatenate([tokens.trained for tokens in wanted]).tolist()
    if all(weight in (0, 1) for _, weights in rows for weight in weights):
        assert side.weights is None
        assert not (made.folder / "train" / "weights.bin").exists()
        assert made.counts["train"].weighted_tokens == 0
    else:
        stored = np.concatenate([tokens.weights for tokens in wanted])
        assert np.asarray(side.weights).tolist() == stored.tolist()
        assert side.row(len(rows) - 1).weights.tolist() == wanted[-1].weights.tolist()
        assert made.counts["train"].weighted_tokens == ((stored != 0) & (stored != 1)).sum()
    assert made.counts["train"].masked_replies == sum(
        turn.get("weight") == 0
        for row, _ in rows
        for turn in read(row).messages
        if turn["role"] == "assistant"
    )


def test_masks_alone_leave_the_data_as_without_weights(tokenizers, tmp_path):
    """The identity of the data changes with the weights, and weights of 1 are none."""
    hashes = []
    for number, weight in enumerate([None, 1, True, 0.5, 2]):
        turn = REPLY if weight is None else REPLY | {"weight": weight}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"messages": [USER, turn]}))
        made = prepare(Data(train=f"{tmp_path}/{number}.jsonl"), tokenizers["tiny"], tmp_path / "cache")
        hashes.append(made.counts["train"].sha256)
    assert hashes[0] == hashes[1] == hashes[2]
    assert len({hashes[0], hashes[3], hashes[4]}) == 3


def test_text_and_pairs_have_the_weight_of_their_row(tokenizers):
    encoder = Encoder(tokenizers["tiny"])
    pair = {"instruction": "q", "output": "a", "history": [["b", "c"]], "loss_weight": 0.25}
    for row in ({"text": "春眠不觉晓", "weight": 0.25}, pair):
        (tokens,) = encoder.encode([read(row)])
        assert tokens.trained.any()
        assert tokens.given_weights().tolist() == (tokens.trained * 0.25).tolist()


@pytest.mark.parametrize(
    "value", [-1, -0.001, float("nan"), float("inf"), 1e300, 10**400, 1e-30, "1", "0.5", [1], {}]
)
def test_what_is_no_weight_is_refused_in_a_line(value):
    for row, where in (
        ({"messages": [USER, REPLY | {"loss": value}]}, "turn 2 has loss"),
        ({"messages": [USER, REPLY], "loss_weight": value}, "has loss_weight"),
        ({"text": "a", "weight": value}, "has weight"),
    ):
        with pytest.raises(BadRow, match="expected 0 or false") as caught:
            read(row)
        assert str(caught.value).startswith(where)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [USER, REPLY | {"weight": 0}, CALL | {"weight": 2}]},
            "turn 3 and the one before it are one turn of the assistant, and have different weights",
        ),
        (
            {"messages": [USER | {"train": True}, REPLY]},
            "turn 1 (user) has weight 1, and only replies are trained",
        ),
        (
            {"messages": [USER, REPLY | {"weight": 0}]},
            "each reply has weight 0: there is nothing to learn from",
        ),
        ({"messages": [USER, REPLY], "weight": 0}, "has weight 0: there is nothing to learn from"),
        (
            {"messages": [USER, REPLY | {"weight": 1, "loss": False}]},
            "turn 2 has weight and loss, which differ",
        ),
    ],
)
def test_weights_that_say_nothing_or_two_things_are_refused(row, reason):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert str(caught.value).startswith(reason)


def test_a_call_has_the_weight_of_its_turn_and_other_names_can_be_mapped(tokenizers):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0}
    turns = [{"from": "human", "value": "q"}, call, {"from": "observation", "value": "x"}]
    row = read({"conversations": [*turns, {"from": "gpt", "value": "a", "wichtig": 0.5}]}, wichtig="weight")
    assert [message.get("weight") for message in row.messages] == [None, 0, None, 0.5]
    assert read({"messages": [USER, REPLY | {"weight": 0}]}, weight=None).messages[1] == REPLY


def test_pairs_say_whether_their_reply_is_learnt_as_xtuner_writes_it():
    pairs = [{"input": "q", "output": "a", "output_with_loss": False}, {"input": "q", "output": "b"}]
    assert [turn.get("weight") for turn in read({"conversation": pairs}).messages] == [None, 0, None, None]


def test_train_on_and_weights(tokenizers):
    turns = [USER, REPLY | {"weight": 0.5}, USER, {"role": "assistant", "content": "b", "weight": 0}]
    (last,) = Encoder(tokenizers["tiny"], "last_assistant").encode([read({"messages": turns})])
    assert str(last) == "its last reply has weight 0: there is nothing to learn from"
    (last,) = Encoder(tokenizers["tiny"], "last_assistant").encode([read({"messages": turns[:2]})])
    assert set(last.given_weights().tolist()) == {0, 0.5}
    (every,) = Encoder(tokenizers["tiny"], "all").encode([read({"messages": turns})])
    assert "data.train_on=all trains all turns alike" in str(every)
    (every,) = Encoder(tokenizers["tiny"], "all").encode([read({"messages": [USER, REPLY], "weight": 3})])
    assert every.weights.tolist() == [0, *[3] * (len(every.ids) - 1)]


@pytest.mark.parametrize(
    ("max_length", "options"),
    [
        (120, {"overlength": "truncate"}),
        (120, {"overlength": "split"}),
        (30, {"overlength": "split", "split_replies": True}),
    ],
)
def test_long_rows_keep_their_weights(tokenizers, tmp_path, max_length, options):
    replies = [{"role": "assistant", "content": f"答{n}。" * 5, "weight": n} for n in range(6)]
    replies.append({"role": "assistant", "content": "答0。" * 60, "weight": 0})
    turns = [turn for reply in replies for turn in (USER, reply)]
    (tmp_path / "my.jsonl").write_text(json.dumps({"messages": turns}))
    data = Data(train=f"{tmp_path}/my.jsonl", max_length=max_length, **options)
    made = prepare(data, tokenizers["tiny"], tmp_path / "cache")
    side, seen = made.side("train"), set()
    for number in range(len(side)):
        tokens = side.row(number)
        assert tokens.trained[1:].tolist() == (tokens.weights > 0)[1:].tolist()
        for weight in np.unique(tokens.given_weights()[tokens.trained]):
            words = tokenizers["tiny"].decode(tokens.ids[tokens.given_weights() == weight])
            assert set(words) & set("0123456789") <= {str(int(weight))}
            seen.add(int(weight))
    assert seen == ({1, 2, 3, 4, 5} if options["overlength"] == "split" else seen & {1, 2})
    assert seen
    assert made.counts["train"].lost_replies == 0, "a masked reply is not lost"


def test_a_question_is_compared_with_the_first_trained_reply():
    question = question_of(
        read({"messages": [USER, REPLY | {"weight": 0}, USER, {"role": "assistant", "content": "b"}]})
    )
    assert (len(question.messages), question.reference) == (3, "b")


@pytest.fixture
def config(tmp_path):
    turns = [USER, REPLY | {"weight": 0}, USER, {"role": "assistant", "content": "十点。", "weight": 0.5}]
    (tmp_path / "my.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "my.yaml").write_text(
        f"model: {{name_or_path: tiny}}\ndata: {{train: '{tmp_path}/my.jsonl'}}\n"
    )
    return load_config(tmp_path / "my.yaml", {"run_dir": str(tmp_path / "runs" / "my")})


def test_preview_and_check_show_weights(config):
    shown = Console(file=io.StringIO(), width=300)
    preview(config, "train", 1, 1, ids=False, console=shown)
    preview(config, "train", 1, 1, ids=True, console=shown)
    check(config, None, shown)
    shown = shown.file.getvalue()
    assert "⟦十点。<|im_end|>⟧×0.5" in shown
    assert "上午九点。<|im_end|>" in shown
    assert "⟦上午" not in shown
    assert "yes×0.5" in shown
    assert "1 reply has weight 0 and is not trained" in shown or "1 replies have weight 0" in shown
