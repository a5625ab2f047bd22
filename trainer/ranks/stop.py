"""The one place that decides to stop before the last step. A stop request to any rank (stop_request.py) or
the clock is enough. All ranks agree in each step; then they save that step and leave with exit code 75."""

import time

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.trainer.ranks.stop_request import StopRequest

TIME_IS_OVER = "train.max_time_min is over"


def any_rank(flags: torch.Tensor) -> list[bool]:
    """Return which of the flags are set on any rank. flags: int32 [n]; every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


class Stop(TrainerCallback):
    """Decides whether an attempt stops early. agreed: all ranks know of a stop request; stopped: training
    ended for it, before the last step. max_time_s: seconds that the attempt may take from now. It stops when
    the next step and a save might not fit, but only after a first step: else it could repeat for ever."""

    def __init__(self, request: StopRequest | None = None, max_time_s: float | None = None) -> None:
        self.request = request or StopRequest()
        self.deadline = float("inf") if max_time_s is None else time.monotonic() + max_time_s
        self.agreed = self.stopped = False
        self.longest_save_s = 0.0
        self._longest_step_s = 0.0
        self._steps = 0
        self._step_start = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop, by a signal or by the clock."""
        if self._steps and time.monotonic() + self._longest_step_s + self.longest_save_s > self.deadline:
            self.request.ask(TIME_IS_OVER)
        return self.request.asked

    @property
    def why(self) -> str:
        """Why the ranks stop, as far as this one knows."""
        return self.request.why or "another process was asked to"

    def agree(self, device: torch.device, also: torch.Tensor | None = None) -> bool:
        """Have all ranks agree whether to stop; return whether `also`, any other flag, is set on a rank."""
        flags = torch.tensor([int(self.asked), 0], dtype=torch.int32, device=device)
        if also is not None:
            flags[1] = also
        stop, other = any_rank(flags)
        self.agreed = self.agreed or stop
        return other

    def ended_early(self, step: int, max_steps: int) -> bool:
        """Whether the attempt ends before its last step. step: the last one trained; 0 before any."""
        return self.stopped or (self.agreed and step < max_steps)

    def end(self, control: TrainerControl) -> None:
        """Save the step and stop. An evaluation that is due comes first in the next attempt."""
        self.stopped = True
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_step_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the clock of a step."""
        self._step_start = time.monotonic()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save and stop, if the ranks agreed to; after the last step there is nothing left to stop."""
        self._steps += 1
        self._longest_step_s = max(self._longest_step_s, time.monotonic() - self._step_start)
        if self.agreed and state.global_step < state.max_steps:
            self.end(control)

    def on_epoch_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Cancel the epoch end's actions if the run is stopped: Trainer calls this even in mid-epoch."""
        if self.stopped:
            control.should_log = control.should_evaluate = control.should_save = False
