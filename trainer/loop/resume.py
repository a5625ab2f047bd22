"""The parts of a resume besides tensors (state.py): the schedule, and Trainer's own counters."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ResumeCallback(TrainerCallback):
    """Restores what Trainer does not: the loss since the last logging step, and the config's intervals."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restore, when the run is resumed."""
        if saved := self.trainer.resumed:
            state.compute_steps(args, state.max_steps)  # the checkpoint's intervals may differ
            losses = saved.loss_so_far
            same_ranks = len(losses) == args.world_size
            loss = losses[args.process_index] if same_ranks else sum(losses) / len(losses)
            self.trainer._tr_loss.fill_(loss)
            self.trainer._globalstep_last_logged = saved.logged_step


def restore_schedule(schedule: LambdaLR, optimizer: torch.optim.Optimizer, last_epoch: int) -> None:
    """Put the learning rate's schedule at a step, and the optimizer's groups at that step's rates."""
    schedule.last_epoch = last_epoch
    schedule._step_count = last_epoch + 1
    factors = [factor(last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
