"""Micro-batches are the steps, cut; packs of a last step are spread; what is kept does not grow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.data.order import Order, teams_of
from qwenlora.data.packing import pack


@st.composite
def orders(draw):
    """Orders of rows, and of packs."""
    per_device, at_once = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 6]))
    lengths = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=70)))
    packs = pack(lengths, 60) if draw(st.booleans()) else None
    return Order(lengths, per_device * at_once, per_device, draw(st.integers(0, 2**32 - 1)), packs, 60)


@given(orders(), st.integers(0, 3))
def test_the_micro_batches_of_an_epoch_are_its_steps_cut_in_order(order, epoch):
    cut = [list(batch) for batch in order.micro_batches(epoch, 1, 0)]
    assert all(len(batch) <= order.per_device_batch_size for batch in cut)
    accumulation = order.global_batch_size // order.per_device_batch_size
    for step in range(order.steps_per_epoch):
        together = [unit for batch in cut[step * accumulation : (step + 1) * accumulation] for unit in batch]
        assert together == order.step(epoch, step)


def test_packs_of_the_last_step_are_shared_out_so_that_each_rank_has_some():
    lengths = np.array([30, 30, 20, 20, 10, 10])
    order = Order(lengths, 4, 1, 3, pack(lengths, 60), 60)
    (step,) = (order.step(0, number) for number in range(order.steps_per_epoch))
    assert len(order.packs) < 4, "by themselves they are too few"
    assert len(step) == 4
    sizes = [int(lengths[unit].sum()) for unit in step]
    assert sizes == sorted(sizes, reverse=True)


def test_the_rows_of_a_step_are_cut_anew_when_another_is_looked_up_in_between():
    order = Order(np.arange(1, 41), 8, 2, 7)
    first = [list(unit) for unit in order.step(0, 0)]
    order.step(1, 2)
    assert order.step(0, 0) == first
    assert len(order._cache) == len(order._steps) == 1, "what is kept of a long run does not grow"


def test_processes_that_make_no_teams_are_refused_with_what_fits():
    assert teams_of(8, 2) == 4
    with pytest.raises(
        ValueError, match=r"sequence_parallel=3 does not divide .* 8; set it to one of 1, 2, 4, 8"
    ):
        teams_of(8, 3)
