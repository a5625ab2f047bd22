"""Packs hold every row once, never overflow, are nearly full, and do not depend on who asks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.configs.schema import Data
from qwenlora.data.order import Order
from qwenlora.data.packing import pack, spread
from qwenlora.data.prepared import prepare


@st.composite
def lengths(draw):
    limit = draw(st.integers(1, 60))
    return np.array(draw(st.lists(st.integers(1, limit), max_size=80)), np.int32), limit + draw(
        st.integers(0, 40)
    )


@given(lengths())
def test_every_row_is_in_one_pack_and_no_pack_overflows(case):
    rows, size = case
    packs = pack(rows, size)
    assert sorted(packs.rows.tolist()) == list(range(len(rows)))
    assert [len(packs[number]) for number in range(len(packs))] == np.diff([0, *packs.ends]).tolist()
    assert (packs.lengths(rows) <= size).all()
    assert packs.lengths(rows).tolist() == [int(rows[packs[number]].sum()) for number in range(len(packs))]


@given(lengths())
def test_no_two_packs_would_fit_into_one(case):
    rows, size = case
    totals = np.sort(pack(rows, size).lengths(rows))
    assert len(totals) < 2 or totals[:2].sum() > size, "the emptiest two could be one"


def test_the_same_lengths_give_the_same_packs():
    rows = np.random.RandomState(0).randint(1, 900, 5000)
    first, again = pack(rows, 1000), pack(rows.astype(np.int64), 1000)
    assert first.rows.tolist() == again.rows.tolist()
    assert first.ends.tolist() == again.ends.tolist()


@pytest.mark.parametrize("spread_of", ["lognormal", "uniform"])
def test_a_million_rows_are_packed_nearly_full(spread_of):
    random = np.random.RandomState(1)
    rows = (
        np.clip(random.lognormal(5, 0.8, 10**6), 1, 4096)
        if spread_of == "lognormal"
        else random.randint(1, 4097, 10**6)
    )
    rows = rows.astype(np.int32)
    packs = pack(rows, 4096)
    assert (packs.lengths(rows) <= 4096).all()
    assert len(np.unique(packs.rows)) == 10**6
    assert rows.sum() / (len(packs) * 4096) > 0.998


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into a pack of 8"):
        pack(np.array([1, 9]), 8)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_packs_of_real_rows_are_995_permille_full(tmp_path, assets, tokenizers, name):
    data = Data(train=str(assets / "data" / "medical_qa_sharegpt.jsonl"))
    rows = prepare(data, tokenizers[name], tmp_path).side("train").lengths
    for size in (2048, 4096, 8192):
        assert rows.sum() / (len(pack(rows, size)) * size) >= 0.995, f"{name}, {size} tokens"


def work_of_ranks(order, ranks: int = 64) -> np.ndarray:
    """Return tokens [steps, ranks] of an epoch."""
    work = np.zeros((order.steps_per_epoch, ranks))
    for step in range(order.steps_per_epoch):
        for number, unit in enumerate(order.step(0, step)):
            work[step, number % ranks] += order.lengths[unit].sum()
    return work


@pytest.mark.parametrize("global_batch", [64, 128])
@pytest.mark.parametrize("longest", [4096, 600])
def test_64_ranks_have_equal_work_in_every_step(global_batch, longest):
    rows = np.clip(np.random.RandomState(2).lognormal(5, 0.8, 200_000), 8, longest).astype(np.int32)
    work = work_of_ranks(Order(rows, global_batch, 1, 7, pack(rows, 4096), 4096))
    slowest = work.max(1) / work.mean(1)
    assert (slowest[:-1] <= 1.05).all(), "the slowest rank's tokens, by the mean"
    assert work.max(1).sum() / work.mean(1).sum() <= 1.05
    # in the last, smaller step one row may be more than a rank's share, which nothing can balance
    assert work[-1].max() <= max(1.05 * work[-1].mean(), longest)


def test_the_last_step_is_spread_over_all_ranks():
    rows = np.full(100, 10)
    order = Order(rows, 16, 1, 0, pack(rows, 50), 50)  # 20 packs: one step of 16, and 4 left
    units = order.step(0, 1)
    assert len(units) == 16
    assert sorted(len(unit) for unit in units) == [1] * 12 + [2] * 4
    assert sorted(row for step in (0, 1) for unit in order.step(0, step) for row in unit) == list(range(100))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 10), st.integers(30, 200))
def test_rows_are_spread_evenly_or_not_at_all(rows, packs, size):
    rows = np.array(rows)
    held = spread(rows, packs, size)
    if held is not None:
        assert sorted(row for some in held for row in some) == list(range(len(rows)))
        totals = [int(rows[some].sum()) for some in held]
        assert max(totals) <= size
        assert max(totals) - min(totals) <= rows.max()
