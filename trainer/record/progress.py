"""What a person sees: a table of derived facts, a progress bar in a terminal, plain lines everywhere else.

screen.py decides where that is seen.
"""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("qwenlora")


def facts_table(title: str, facts: dict[str, str]) -> Table:
    """Return a two-column table."""
    table = Table(
        title=title, title_justify="left", show_header=False, box=None, pad_edge=False, title_style="bold"
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


class ProgressCallback(TrainerCallback):
    """Rank 0's bar or lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self._task = TaskID(0)
        self._shown = ""
        self._first, self._start = 0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar, in a terminal."""
        self._first, self._start = state.global_step, time.monotonic()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[shown]}"),
                console=self.console,
                expand=True,
                redirect_stdout=False,  # what libraries say goes to the log, as it does without a bar
                redirect_stderr=False,
            )
            self._task = self.bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, shown=""
            )
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(
                self._task, completed=state.global_step, shown=f"{self._shown}  {self._left(state)} left"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Show the newest numbers."""
        if "loss" in logs:
            self._shown = (
                f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_s']:,.0f}"
                " tokens/s"
            )
            line = f"{_step(state)}  {self._shown}  {self._left(state)} left"
        elif "eval_loss" in logs:
            line = (
                f"{_step(state)}  eval_loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
            )
        else:
            return
        log.info(line)
        self.console.print(line, soft_wrap=True)
        if self.bar:
            self.bar.update(self._task, shown=f"{self._shown}  {self._left(state)} left")

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def _left(self, state: TrainerState) -> str:
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
