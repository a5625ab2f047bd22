"""The learning rate's schedule: the first step trains something, the other steps have transformers' rates."""

import math
import typing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from qwenlora.configs.schema import SchedulerName, Train
from qwenlora.trainer import build
from qwenlora.trainer.loop.schedule import begin_above_zero, check_schedule, restore_schedule

KWARGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.0},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.0, "warmup_lr_rate": 0.0},
    "warmup_stable_decay": {"num_decay_steps": 1, "warmup_type": "cosine"},
}


def schedule_of(name, warm_up, steps, rate=0.01):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warm_up,
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(KWARGS.get(name, {})),
    )


def rates_of(schedule, steps, rates=()):
    rates = list(rates)
    while len(rates) < steps:
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


@given(
    name=st.sampled_from(typing.get_args(SchedulerName)),
    steps=st.integers(1, 30),
    share=st.floats(0, 1, exclude_max=True),
)
def test_the_first_step_trains_and_all_others_stay(name, steps, share):
    warm_up = math.ceil(steps * share)
    assume(name != "polynomial" or warm_up < steps)  # transformers' own divides by 0 after the last step
    theirs = rates_of(schedule_of(name, warm_up, steps), steps)
    schedule = schedule_of(name, warm_up, steps)
    begin_above_zero(schedule)
    ours = rates_of(schedule, steps)
    assert ours[1:] == theirs[1:]
    assert 0 < ours[0] <= 0.01
    assert ours[0] == theirs[0] or theirs[0] == 0.0


@pytest.mark.parametrize(("warm_up", "first"), [(0, 0.01), (1, 0.005), (20, 0.01 / 40)])
def test_the_first_step_has_the_rate_of_half_a_step(warm_up, first):
    schedule = schedule_of("cosine", warm_up, 40)
    begin_above_zero(schedule)
    assert rates_of(schedule, 1) == [pytest.approx(first)]


def test_a_warm_up_as_long_as_the_run_may_end_with_it():
    schedule = schedule_of("polynomial", 2, 2)
    begin_above_zero(schedule)
    assert rates_of(schedule, 2) == pytest.approx([0.0025, 0.005])


def test_a_resumed_schedule_goes_on_as_the_one_that_never_stopped():
    whole, resumed = schedule_of("linear", 5, 12), schedule_of("linear", 5, 12)
    for schedule in (whole, resumed):
        begin_above_zero(schedule)
    before = rates_of(whole, 12)
    restore_schedule(resumed, resumed.optimizer, 3)
    assert rates_of(resumed, 12, before[:3]) == before


def test_the_warm_up_that_is_checked_is_the_one_that_trainer_makes(tmp_path):
    for share, steps in ((0.03, 1), (0.03, 40), (0.5, 3), (2.0, 9)):
        arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=share, use_cpu=True)
        assert arguments.get_warmup_steps(steps) == (math.ceil(share * steps) if share < 1 else int(share))


def test_a_schedule_whose_rate_is_always_0_is_refused():
    settings = {"num_stable_steps": 0, "num_decay_steps": 0}
    train = Train(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=settings, warmup_steps=0.0)
    with pytest.raises(ValueError, match="the learning rate of all 3 steps is 0; change them"):
        check_schedule(train, 3)
    check_schedule(train.model_copy(update={"warmup_steps": 1.0}), 3)
    # of a run that goes on for longer, only the ranks hear: it is not prepared again
    config, facts = SimpleNamespace(train=train), SimpleNamespace(units=48)
    with pytest.raises(ValueError, match="the learning rate of all 9 steps is 0; change them"):
        build._check_length(config, facts, 0)
