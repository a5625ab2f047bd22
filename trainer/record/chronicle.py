"""An attempt's entry in the run's history: where it started, how long that took, which steps it repeated."""

import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Planned, Reason


class Chronicle(TrainerCallback):
    """Records the start of an attempt when its first step is done; on rank 0. Make it before the model: it
    times its loading. prepare_s: seconds of the preparation, before this process started."""

    def __init__(self, run: RunFolder, prepare_s: float) -> None:
        self.run, self.prepare_s = run, prepare_s
        self.number = len(run.history.attempts())
        self._last_step = run.history.last_step()
        self._start_up_s = run.history.seconds_since_start() - prepare_s
        self._since = time.monotonic()
        self._model_s = 0.0
        self._first_step = 1
        self._checkpoint: Path | None = None
        self._strategy = ""
        self._planned: Planned | None = None
        self._send: Callable[[int, dict[str, float]], None] = lambda step, values: None
        self._recorded = False

    def starts(
        self,
        checkpoint: Path | None,
        step: int,
        strategy: str,
        planned: Planned | None,
        send: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Set where the attempt starts. step: the checkpoint's last, 0 without one; strategy: in words; send:
        takes a step, and numbers for trackers by their names."""
        self._checkpoint, self._first_step, self._strategy = checkpoint, step + 1, strategy
        self._planned, self._send = planned, send

    def summary(self, reason: Reason) -> dict[str, object]:
        """Return the summary of all attempts for trackers, if this one ends now for a reason."""
        attempts = self.run.history.so_far(reason)
        lines = {
            f"attempt/{attempt.attempt}": attempt.model_dump(mode="json", exclude_none=True)
            for attempt in attempts
        }
        return {"attempts": len(attempts), "goodput": attempts[-1].goodput if attempts else None, **lines}

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Take the time that model and checkpoint needed."""
        self._model_s = time.monotonic() - self._since
        self._since = time.monotonic()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """After the first step, record how long the start took."""
        if self._recorded:
            return
        self._recorded = True
        seconds = {
            "start_up": self._start_up_s,
            "data": self.prepare_s,
            "model": self._model_s,
            "first_step": time.monotonic() - self._since,
        }
        repeated = max(self._last_step - self._first_step + 1, 0)
        self.run.note_attempt(
            resumed_from=self._checkpoint.name if self._checkpoint else None,
            strategy=self._strategy,
            planned=self._planned,
            first_step=self._first_step,
            steps_repeated=repeated,
            seconds={name: round(value, 2) for name, value in seconds.items()},
        )
        numbers = {"number": self.number, "restart_s": sum(seconds.values()), "steps_repeated": repeated}
        numbers |= {f"restart/{name}_s": value for name, value in seconds.items()}
        self._send(state.global_step, {f"attempt/{name}": value for name, value in numbers.items()})
