"""When a snapshot is kept in memory, between two checkpoints."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.run.snapshots import EVERY_S
from qwenlora.trainer.loop.trainer import LoraTrainer
from qwenlora.trainer.ranks.from_rank_0 import from_rank_0

TIMED_STEPS = 3  # after the first, which compiles and allocates


class InMemory(TrainerCallback):
    """Has a snapshot made, on all ranks alike. every: steps; None: as many as take EVERY_S, as measured."""

    def __init__(self, trainer: LoraTrainer, every: int | None) -> None:
        self._trainer, self._every = trainer, every
        self._steps, self._since = 0, 0.0

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a save to memory where a step needs one, and is not saved to disk."""
        if self._every is None:
            self._measure()
        due = self._every and state.global_step % self._every == 0
        if due and not control.should_save and not control.should_training_stop:
            self._trainer.only_memory = control.should_save = True

    def _measure(self) -> None:
        self._steps += 1
        if self._steps == 1:
            self._since = time.monotonic()
        if self._steps == 1 + TIMED_STEPS:
            step_s = (time.monotonic() - self._since) / TIMED_STEPS
            self._every = from_rank_0(lambda: max(1, round(EVERY_S / max(step_s, 1e-3))))
