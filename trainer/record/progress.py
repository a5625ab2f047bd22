"""The display of a run: a progress bar in a terminal, plain lines everywhere else."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.trainer.record.metrics import Logs

log = logging.getLogger("qwenlora")


class ProgressCallback(TrainerCallback):
    """Rank 0's progress bar, or its lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self._task = TaskID(0)
        self._numbers = ""
        self._first, self._start = 0, time.monotonic()

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Show the bar, if this is a terminal."""
        self._first, self._start = state.global_step, time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[shown]}"),
                console=self.console,
                expand=True,
                redirect_stdout=False,  # libraries print to the log, as they do without a bar
                redirect_stderr=False,
            )
            self._task = self.bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, shown=""
            )
            self.bar.start()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Move the bar."""
        self._update_bar(state)

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **_: object) -> None:
        """Show the newest numbers."""
        if "loss" in logs:
            self._numbers = (
                f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_s']:,.0f}"
                " tokens/s"
            )
            line = f"{_step(state)}  {self._numbers}  {self._time_left(state)} left"
        elif "eval_loss" in logs:
            line = (
                f"{_step(state)}  eval_loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
            )
        else:
            return
        log.info(line)
        self.console.print(line, soft_wrap=True)
        self._update_bar(state)

    def stop(self) -> None:
        """Leave the bar on the screen as it is."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _update_bar(self, state: TrainerState) -> None:
        if self.bar:
            shown = f"{self._numbers}  {self._time_left(state)} left"
            self.bar.update(self._task, completed=state.global_step, shown=shown)

    def _time_left(self, state: TrainerState) -> str:
        trained = state.global_step - self._first
        if not trained:
            return "?"
        seconds = (time.monotonic() - self._start) / trained * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        return (
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
        )


def _step(state: TrainerState) -> str:
    return f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
