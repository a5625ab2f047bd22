"""`qwenlora watch [RUN|DIR|JOB]`: all runs and their jobs on one screen, read again every two seconds.

The facts are watched.py's; cancel, resume and logs are those of the commands of these names.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Label, RichLog, Static

from qwenlora.jobs import cancel as cancelling
from qwenlora.jobs.find import find
from qwenlora.jobs.submission import resume as resuming
from qwenlora.jobs.views.logs import log_file
from qwenlora.jobs.views.status import attempt_table, details, job_line, run_line
from qwenlora.jobs.views.watched import Watched, sparkline
from qwenlora.run.format import clock, count, number, printable

REFRESH_S = 2.0
LOG_S = 0.5
_LOG_TAIL = 2**16  # bytes
_STYLES = {"running": "green", "failed": "red", "killed": "red", "refused": "red", "unknown": "yellow"}

Read = Callable[[], list[Watched]]


@dataclass(frozen=True)
class Column:
    """A column of the table. from_width: the narrowest screen that has room for it."""

    title: str
    cell: Callable[[Watched], str]
    from_width: int = 0
    left: bool = False


def _steps(run: Watched) -> str:
    return f"{run.overview.step}/{run.steps}" if run.steps else str(run.overview.step)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


COLUMNS = (
    Column("state", lambda run: run.state, left=True),
    Column("step", _steps),
    Column("loss", lambda run: number(run.newest("loss"))),
    Column("", lambda run: sparkline(run.losses, 10), left=True),
    Column("tokens/s", lambda run: number(run.newest("tokens_per_s"))),
    Column("left", lambda run: "-" if run.left_s is None else clock(run.left_s)),
    Column("MFU", lambda run: _percent(run.newest("mfu")), 96),
    Column("attempts", lambda run: str(len(run.overview.attempts)), 96),
    Column("goodput", lambda run: _percent(run.goodput), 110),
    Column("causes", lambda run: run.causes or "-", 140, left=True),
    Column("waits for", lambda run: run.waits_for or "-", 140, left=True),
)


def facts(run: Watched) -> list[str]:
    """Return the lines about a run: what `qwenlora status` says, and the newest numbers."""
    attempts = run.overview.attempts
    lines = [run_line(run.run, attempts, run.job)] if attempts else [f"{run.overview.name}: {run.state}"]
    lines += [job_line(run.job.job_id, run.job)] if run.job else []
    shown = {
        "eval loss": number(run.overview.evaluated.get("eval_loss")),
        "tokens/s": number(run.newest("tokens_per_s")),
        "MFU": _percent(run.newest("mfu")),
        "left": "-" if run.left_s is None else clock(run.left_s),
        "ended by Slurm": run.causes or "-",
    }
    known = [f"{name} {value}" for name, value in shown.items() if value != "-"]
    lines.append(" · ".join([count(len(attempts), "attempt"), *known]))
    return [printable(line) for line in [*lines, *(details(attempts[-1]) if attempts else [])]]


class Confirm(ModalScreen[bool]):
    """Asks whether to do something to a run."""

    CSS = "Confirm {align: center middle} Confirm > Label {border: round; padding: 1 2; max-width: 70}"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "dismiss(True)", "yes"),
        ("n", "dismiss(False)", "no"),
        ("escape", "dismiss(False)", "no"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        """Show the question."""
        yield Label(Text(f"{self.text}\n\ny: yes   n: no"))


class RunScreen(Screen[None]):
    """A run: what is known of it, its losses, its attempts."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss", "back")]

    def compose(self) -> ComposeResult:
        """Make room for the text."""
        with VerticalScroll():
            yield Static(id="run")
        yield Static(id="said")
        yield Footer()

    def show(self, run: Watched) -> None:
        """Show the run as it is now."""
        parts: list[RenderableType] = [Text(line) for line in facts(run)]
        if run.losses:
            first, last = run.lines[0]["step"], run.lines[-1]["step"]
            line = sparkline(run.losses, max(self.size.width - 4, 10))
            parts += [Text(f"\nloss, steps {first:.0f} to {last:.0f}", style="bold"), Text(line)]
        if run.overview.attempts:
            parts += [Text(), attempt_table(run.overview.attempts)]
        self.query_one("#run", Static).update(Group(*parts))


class LogScreen(Screen[None]):
    """The log of a run's job or of its first process, as it grows."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss", "back")]

    def __init__(self, run: Watched) -> None:
        super().__init__()
        self.path = run.run.path
        self._file: Path | None = None
        self._position = 0
        self._rest = b""

    def compose(self) -> ComposeResult:
        """Make room for the lines."""
        yield Static(id="file")
        yield RichLog(wrap=True, max_lines=5000)
        yield Footer()

    def on_mount(self) -> None:
        """Begin to read."""
        self.read()
        self.set_interval(LOG_S, self.read)

    def read(self) -> None:
        """Show what is new in the log; when a new attempt has another file, go on with that."""
        file = log_file(find(str(self.path)), None)
        if file is None or not file.exists():
            self.query_one("#file", Static).update("no log yet")
            return
        if file != self._file:
            self._file, self._rest = file, b""
            self._position = max(file.stat().st_size - _LOG_TAIL, 0)
            self.query_one("#file", Static).update(Text(str(file), style="bold"))
        with file.open("rb") as opened:
            opened.seek(self._position)
            new = opened.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        shown = self.query_one(RichLog)
        for line in lines:
            shown.write(Text(printable(Text.from_ansi(line.decode("utf-8", "replace")).plain)))


class WatchApp(App[None]):
    """The list of runs. read: returns them; title: what is watched."""

    CSS = """
    DataTable {height: 1fr}
    DataTable > .datatable--cursor {text-style: reverse; color: ansi_default; background: ansi_default}
    #facts {height: auto; max-height: 9; border-top: solid; padding: 0 1}
    #title, #file {text-style: bold; height: 1}
    #said {height: auto}
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "open", priority=True),  # else the table has this key
        ("l", "log", "log"),
        ("c", "cancel", "cancel"),
        ("r", "resume", "resume"),
        ("q", "quit", "quit"),
    ]

    def __init__(self, read: Read, what: str) -> None:
        super().__init__(ansi_color=True)  # the terminal's own colours, or none: NO_COLOR
        self.theme = "ansi-dark"  # on a light terminal, too: its colours have names
        self._read, self._what = read, what
        self._runs: dict[str, Watched] = {}
        self._reading = False

    def compose(self) -> ComposeResult:
        """Lay the screen out."""
        yield Static(id="title")
        yield DataTable(cursor_type="row", zebra_stripes=False)
        yield Static(id="facts")
        yield Static(id="said")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to read."""
        self.reload()
        self.set_interval(REFRESH_S, self.reload)

    def on_resize(self) -> None:
        """Show the columns that have room now."""
        self._show_table()

    def on_data_table_row_highlighted(self) -> None:
        """Tell of the run under the cursor."""
        self._show_facts()

    def on_data_table_row_selected(self) -> None:
        """Open the run under the cursor."""
        self.action_open()

    @work(thread=True)
    def reload(self) -> None:
        """Read all runs, beside the screen: Slurm may take its time."""
        if self._reading:
            return
        self._reading = True
        try:
            runs = self._read()
            self.call_from_thread(self.show, runs)
        except (OSError, ValueError) as error:  # a folder that is gone
            self.call_from_thread(self.say, str(error))
        finally:
            self._reading = False

    def show(self, runs: Sequence[Watched]) -> None:
        """Show the runs as they are now."""
        self._runs = {str(run.run.path): run for run in runs}
        under_way = sum(run.state == "running" for run in runs)
        parts = [f"qwenlora watch {self._what}", count(len(runs), "run"), f"{under_way} running"]
        title = Text(" · ".join([*parts, time.strftime("%H:%M:%S")]), no_wrap=True, overflow="ellipsis")
        self._main.query_one("#title", Static).update(title)
        self._show_table()
        self._show_facts()
        if isinstance(self.screen, RunScreen) and (run := self.chosen):
            self.screen.show(run)

    def say(self, text: str) -> None:
        """Show what an action did, or why it could not."""
        for screen in self.screen_stack:
            for line in screen.query("#said").results(Static):
                line.update(Text(printable(text)))

    @property
    def _main(self) -> Screen[object]:
        return self.screen_stack[0]

    @property
    def _table(self) -> DataTable[Text]:
        return self._main.query_one(DataTable)

    @property
    def chosen(self) -> Watched | None:
        """The run under the cursor; None where there is none."""
        table = self._table
        if not table.row_count:
            return None
        key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return self._runs.get(key or "")

    def _show_table(self) -> None:
        """Put the runs into the table; the cursor stays on its run."""
        table = self._table
        columns = [column for column in COLUMNS if self.size.width >= column.from_width]
        cells = {key: self._cells(run, columns) for key, run in self._runs.items()}
        shown = [column.key.value for column in table.columns.values()], [row.value for row in table.rows]
        if shown != (["run", *(column.title for column in columns)], list(cells)):
            self._fill(columns, cells)
            return
        for row, texts in enumerate(cells.values()):
            for at, text in enumerate(texts):
                if table.get_cell_at(Coordinate(row, at)) != text:
                    table.update_cell_at(Coordinate(row, at), text, update_width=True)

    def _fill(self, columns: Sequence[Column], cells: Mapping[str, Sequence[Text]]) -> None:
        """Make the table anew: columns or runs are other ones."""
        table, chosen = self._table, self.chosen
        table.clear(columns=True)
        for title, left in [("run", True), *((column.title, column.left) for column in columns)]:
            table.add_column(Text(title, justify="left" if left else "right"), key=title)
        for key, texts in cells.items():
            table.add_row(*texts, key=key)
        if chosen and (key := str(chosen.run.path)) in cells:
            table.move_cursor(row=list(cells).index(key))

    def _cells(self, run: Watched, columns: Sequence[Column]) -> list[Text]:
        name, room = printable(run.overview.name), 18 if self.size.width < 96 else 40
        shown = name if len(name) <= room else f"{name[: room - 1]}…"
        cells = [Text(shown, style="bold")]
        for column in columns:
            style = _STYLES.get(run.state, "") if column.title == "state" else ""
            cells.append(Text(column.cell(run), style, justify="left" if column.left else "right"))
        return cells

    def _show_facts(self) -> None:
        run = self.chosen
        nothing = "no runs yet; `qwenlora train my.yaml` makes one" if not self._runs else ""
        text = "\n".join(facts(run)) if run else nothing
        self._main.query_one("#facts", Static).update(Text(text))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Whether a key means something on the screen that is shown."""
        if action == "open":
            return self.screen is self._main
        return action not in ("log", "cancel", "resume") or not isinstance(self.screen, LogScreen | Confirm)

    def action_open(self) -> None:
        """Show all of a run."""
        if run := self.chosen:
            screen = RunScreen()
            self.push_screen(screen)
            self.call_after_refresh(screen.show, run)

    def action_log(self) -> None:
        """Follow the log of a run."""
        if run := self.chosen:
            self.push_screen(LogScreen(run))

    def action_cancel(self) -> None:
        """Stop a run for good, if the user says yes."""
        self._ask(
            "Cancel {}? It saves, and does not come back by itself.",
            lambda path: "; ".join(cancelling.cancel(find(path), now=False)),
        )

    def action_resume(self) -> None:
        """Have a run go on, if the user says yes."""
        self._ask("Resume {} from its newest checkpoint?", lambda path: resuming.resume(find(path)))

    def _ask(self, question: str, do: Callable[[str], str]) -> None:
        if run := self.chosen:
            path = str(run.run.path)

            def answered(yes: bool | None) -> None:
                if yes:
                    self._do(do, path)

            self.push_screen(Confirm(question.format(run.overview.name)), answered)

    @work(thread=True)
    def _do(self, do: Callable[[str], str], path: str) -> None:
        """Do it beside the screen, and show the answer."""
        try:
            answer = do(path)
        except (OSError, ValueError) as error:
            answer = str(error)
        self.call_from_thread(self.say, answer)
        self.reload()
