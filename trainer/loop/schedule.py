"""Learning rates: transformers' schedule, with a first step that trains, put at a step for a resume; and the
rate of B under LoRA+."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qwenlora.configs.schema import Train

B = re.compile(r"\.lora_(embedding_)?B\.")  # in names of parameters


def quicken_b(optimizer: torch.optim.Optimizer, model: Any, ratio: float) -> None:
    """Give B groups with so many times the rate. peft's optimizer for LoRA+ gives that to norms and DoRA's
    magnitudes, too. model: whose parameters the optimizer has."""
    of_b = {p for name, p in model.named_parameters() if B.search(name)}
    split = [
        group | {"params": params, "lr": rate}
        for group in optimizer.param_groups
        for params, rate in (
            ([p for p in group["params"] if p not in of_b], group["lr"]),
            ([p for p in group["params"] if p in of_b], group["lr"] * ratio),
        )
    ]
    optimizer.param_groups[:] = [group for group in split if group["params"]]


def begin_above_zero(schedule: LambdaLR) -> None:
    """Give the first step the rate of half a step, where a schedule begins at 0: a warm-up of transformers
    does, so the first step would train nothing, nor would a run of one step. No other step changes."""
    schedule.lr_lambdas = [partial(_above_zero, factor) for factor in schedule.lr_lambdas]
    restore_schedule(schedule, schedule.optimizer, schedule.last_epoch)


def _above_zero(factor: Callable[[Any], float], step: int) -> float:
    try:
        return factor(step) or (factor(0.5) if step == 0 else 0.0)
    except (
        ZeroDivisionError
    ):  # polynomial: the rate after a warm-up that is as long as the run; no step has it
        return 0.0


def check_schedule(train: Train, steps: int) -> None:
    """Refuse a schedule that transformers cannot make, or whose rate is always 0. steps: of the run. Raises:
    ValueError."""
    warm_up = train.warmup_steps
    settings = (
        f"train.lr_scheduler_kwargs={train.lr_scheduler_kwargs} with"
        f" lr_scheduler_type={train.lr_scheduler_type}"
    )
    try:
        schedule = get_scheduler(
            train.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
            num_warmup_steps=math.ceil(warm_up * steps) if warm_up < 1 else int(warm_up),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{settings}: {error}") from error
    begin_above_zero(schedule)
    (factor,) = schedule.lr_lambdas
    if not any(factor(step) for step in range(steps)):
        raise ValueError(
            f"{settings}: the learning rate of all {steps} steps is 0; change them, or train.warmup_steps"
        )


def restore_schedule(schedule: LambdaLR, optimizer: torch.optim.Optimizer, last_epoch: int) -> None:
    """Put the learning rate's schedule at a step, and the optimizer's groups at that step's rates."""
    schedule.last_epoch = last_epoch
    schedule._step_count = last_epoch + 1
    factors = [factor(last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
