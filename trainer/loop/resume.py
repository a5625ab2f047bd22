"""The parts of a resume besides tensors (state.py) and the schedule (schedule.py): Trainer's own counters."""

from typing import Any

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
