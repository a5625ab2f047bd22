"""Stopping on request: a signal sets a flag, all ranks agree on it at the end of a step, save, and leave with 75."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenlora.trainer.screen import StopRequest


class StopCallback(TrainerCallback):
    """Ends training after the step in which any rank was asked to stop. stopped: it did so before the last step."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Agree between ranks; then save and stop."""
        asked = self.request.asked
        if dist.is_initialized():
            flag = torch.tensor(int(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Trainer calls this for a stopped run too, in mid-epoch: nothing is due."""
        if self.stopped:
            control.should_log = control.should_evaluate = control.should_save = False
