"""The order of training is a function of seed, epoch and step; ranks only share it out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.data.order import Order, accumulation_steps, idle_share, micro_batches, teams_of, total_steps
from qwenlora.data.packing import pack


@st.composite
def orders(draw):
    """Orders of rows, and of packs."""
    per_device, at_once = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 6]))
    lengths = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=70)))
    packs = pack(lengths, 60) if draw(st.booleans()) else None
    return Order(lengths, per_device * at_once, per_device, draw(st.integers(0, 2**32 - 1)), packs, 60)


@given(orders(), st.integers(0, 5))
def test_an_epoch_holds_every_row_once(order, epoch):
    rows = [row for step in range(order.steps_per_epoch) for unit in order.step(epoch, step) for row in unit]
    assert sorted(rows) == list(range(len(order.lengths)))


@given(orders(), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 6]))
def test_any_number_of_ranks_walks_the_same_micro_batches(order, epoch, world_size):
    if order.global_batch_size % (order.per_device_batch_size * world_size):
        return
    alone = list(map(list, order.micro_batches(epoch, 1, 0)))
    ranks = [list(map(list, order.micro_batches(epoch, world_size, rank))) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1, "every rank joins every collective"
    assert [batch for together in zip(*ranks, strict=True) for batch in together] == alone


@given(orders(), st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 6]))
def test_tokens_of_ranks_are_those_of_the_micro_batches_that_they_walk(order, step, world_size):
    if -(-order.global_batch_size // order.per_device_batch_size) < world_size:
        return
    epoch, of_epoch = divmod(step, order.steps_per_epoch)
    walked = np.zeros(world_size, np.int64)
    for rank in range(world_size):
        batches = list(order.micro_batches(epoch, world_size, rank))
        each = len(batches) // order.steps_per_epoch
        for batch in batches[of_epoch * each : (of_epoch + 1) * each]:
            walked[rank] += sum(order.lengths[row] for unit in batch for row in unit)
    assert order.tokens_of_ranks(step, world_size).tolist() == walked.tolist()


@given(orders())
def test_no_micro_batch_has_more_tokens_than_the_longest(order):
    def tokens(units):
        return sum(order.lengths[row] for unit in units for row in unit)

    most = tokens(order.longest(order.per_device_batch_size))
    assert all(tokens(batch) <= most for batch in order.micro_batches(0, 1, 0))


def test_the_sizes_of_micro_batches_give_each_rank_some():
    assert micro_batches(24, 2) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(24, 4, 2) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(10, 4) == [3, 1]
    assert micro_batches(9, 4) == [1]
    assert len(micro_batches(10**12, 1)) == 13**2, "divisors, found by their roots"
    with pytest.raises(ValueError, match="fewer than 4 processes; set train.global_batch_size: 4 or more"):
        micro_batches(3, 4)


@given(orders(), st.integers(0, 3))
def test_a_step_is_sorted_by_length_and_knows_its_rows(order, epoch):
    for step in range(order.steps_per_epoch):
        units = order.step(epoch, step)
        assert 0 < len(units) <= order.global_batch_size
        assert (np.diff([order.lengths[unit].sum() for unit in units]) <= 0).all()


def test_packs_of_a_smaller_last_step_are_dealt_out_to_all_and_sorted_again():
    lengths = np.array([10, 9, 5])
    order = Order(lengths, 2, 1, 0, pack(lengths, 60), 60)
    assert order.units == 1
    assert [[int(lengths[row]) for row in unit] for unit in order.step(0, 0)] == [[9, 5], [10]]


def test_the_order_is_the_same_for_ever():
    order = Order(np.ones(10, np.int64), 5, 1, 42)
    assert order.epoch(0).tolist() == [5, 0, 6, 4, 2, 7, 3, 1, 8, 9]
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != Order(np.ones(10, np.int64), 5, 1, 43).epoch(0).tolist()


@pytest.mark.parametrize(
    ("global_batch", "per_device", "world", "message"),
    [
        (16, 16, 2, r"=16 makes 1 micro-batch of .*=16, fewer than 2 processes; set .*train_batch_size: 8"),
        (
            9,
            4,
            12,
            r"fewer than 12 .*global_batch_size: 12 or more, and train.per_device_train_batch_size: 1",
        ),
        (
            3,
            1,
            4,
            r"=3 makes 3 micro-batches of .*=1, fewer than 4 processes; set .*global_batch_size: 4 or more$",
        ),
    ],
)
def test_more_ranks_than_micro_batches_are_refused_with_what_would_do(
    global_batch, per_device, world, message
):
    with pytest.raises(ValueError, match=message):
        accumulation_steps(global_batch, per_device, world)


@pytest.mark.parametrize(
    ("batch", "size", "ranks", "share"), [(20, 4, 3, 1 / 6), (20, 4, 5, 0), (1, 4, 1, 0), (10, 4, 2, 1 / 4)]
)
def test_ranks_are_idle_where_they_do_not_divide_the_micro_batches(batch, size, ranks, share):
    assert idle_share(batch, size, ranks) == pytest.approx(share)


def test_steps_follow_from_rows_and_epochs():
    assert total_steps(120, 20, 3, None) == 18
    assert total_steps(121, 20, 3, None) == 21
    assert total_steps(120, 20, 0.5, None) == 3
    assert total_steps(121, 20, 0.5, None) == 4, "half of 7 steps is rounded up"
    assert total_steps(20, 20, 0.01, None) == 1
    assert total_steps(120, 20, 3, 7) == 7


@given(orders(), st.integers(0, 3))
def test_the_micro_batches_of_an_epoch_are_its_steps_cut_in_order(order, epoch):
    cut = [list(batch) for batch in order.micro_batches(epoch, 1, 0)]
    assert all(len(batch) <= order.per_device_batch_size for batch in cut)
    accumulation = -(-order.global_batch_size // order.per_device_batch_size)
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
