"""Stopping on request: a signal sets a flag, all ranks agree on it at the end of a step, save, and leave with 75."""

import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopCallback(TrainerCallback):
    """Ends training after the step in which any rank was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False

    def listen(self) -> None:
        """Set the flag on the first signal; the second one of a kind has its usual effect."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Agree between ranks; then save and stop."""
        asked = self.asked
        if dist.is_initialized():
            flag = torch.tensor(int(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
