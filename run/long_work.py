"""How far long work is: a bar on a terminal, a line every half a minute in a log."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

from qwenlora.run.format import duration

LINE_S = 30.0
T = TypeVar("T")


class LongWork(Progress):
    """rich's progress bar, or lines. console: by default standard output for a bar, and standard error for
    lines, since the output may be a file of answers."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None, **options: Any) -> None:
        on_terminal = console.is_terminal if console else sys.stdout.isatty()
        console = console or Console(stderr=not on_terminal, markup=False, highlight=False)
        super().__init__(*columns, console=console, transient=True, disable=not on_terminal, **options)
        self._last_line = self.get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Add to what is done of a task."""
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change what is known of a task, as `completed`."""
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now, task = self.get_time(), self._tasks[task_id]
        if not self.disable or now - self._last_line < LINE_S or not task.total or not task.completed:
            return
        self._last_line = now
        left = (now - (task.start_time or now)) / task.completed * (task.total - task.completed)
        self.console.print(
            f"{task.description}: {task.percentage:.0f}%, about {duration(left)} left", soft_wrap=True
        )


def each(items: Sequence[T], title: str) -> Iterator[T]:
    """Yield the items, and show how many of them are done."""
    with LongWork() as work:
        task = work.add_task(title, total=len(items))
        for item in items:
            yield item
            work.advance(task)
