"""Where a run's numbers go besides metrics.jsonl: log.to. All attempts of a run are one run there. A tracker
may fail; training goes on without it."""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import requests
from transformers import TrainerCallback, TrainerState

from qwenlora.run.disk import write_atomically
from qwenlora.trainer.record.metrics import Line, Logs

REACH_TIMEOUT_S = 5.0


class Unused(Exception):  # noqa: N818 - not an error
    """A tracker is off. Its text: why, or empty."""


class Tracker(Protocol):
    """A library's writer. Its methods may raise whatever the library raises, and Unused in start()."""

    title: str

    def start(self) -> str:
        """Open the run; return where it is seen."""

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Forget what is after a step, where the library can. lines: of metrics.jsonl, which it may lack."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by their names, train/loss and the like."""

    def summarize(self, values: Mapping[str, object]) -> None:
        """Add values to the summary of the whole run."""

    def finish(self, *, failed: bool) -> None:
        """Write what waits, and close the run."""


class Trackers(TrainerCallback):
    """Sends each log to all trackers. warn: shows a line to the user; places: {title: where the run is
    seen}."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.places: dict[str, str] = {}
        self._running: list[Tracker] = []
        for tracker in trackers:
            try:
                self.places[tracker.title] = tracker.start()
                self._running.append(tracker)
            except Unused as off:
                self.places[tracker.title] = f"off ({off})" if str(off) else "off"
            except Exception as error:  # whatever a library raises, training goes on
                self.places[tracker.title] = "off"
                warn(f"{tracker.title} cannot be used ({reason(error)}): this attempt is not logged there")

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **_: object) -> None:
        """Send one log."""
        if logs:
            self.send(state.global_step, named(logs))

    def go_back_to(self, step: int, lines: Sequence[Line]) -> None:
        """Forget what is after a step. lines: of metrics.jsonl, which a killed attempt may not have sent."""
        self._each(lambda tracker: tracker.go_back_to(step, lines))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers under these names."""
        self._each(lambda tracker: tracker.log(step, values))

    def summarize(self, values: Mapping[str, object]) -> None:
        """Add values to the summary of the whole run."""
        self._each(lambda tracker: tracker.summarize(values))

    def finish(self, *, failed: bool) -> None:
        """Close the run everywhere."""
        self._each(lambda tracker: tracker.finish(failed=failed))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._running):
            try:
                do(tracker)
            except Exception as error:  # as in __init__
                self._running.remove(tracker)
                self.warn(
                    f"{tracker.title} stopped ({reason(error)}): training goes on without; metrics.jsonl has"
                    " every number"
                )


def named(line: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a log under the names that trackers show: eval_loss is eval/loss."""
    return {
        f"{'eval' if name.startswith('eval_') else 'train'}/{name.removeprefix('eval_')}": value
        for name, value in line.items()
        if name not in ("step", "time")
    }


def reason(error: Exception) -> str:
    """Return an error as a short line, without passwords."""
    return without_password(" ".join(str(error).split()))[:200] or type(error).__name__


def without_password(text: str) -> str:
    """Return a text without the users and passwords of addresses in it."""
    return re.sub(r"://[^/\s]*@", "://", text)


def known_id(file: Path) -> str:
    """Return the id of a run in a tracker; empty before it has one."""
    return file.read_text().strip() if file.exists() else ""


def keep_id(file: Path, run_id: str = "") -> str:
    """Return the id of a run in a tracker; a run that has none gets this one. Default: a new one."""
    if known := known_id(file):
        return known
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, run_id or uuid.uuid4().hex[:12])
    return known_id(file)


def reach(server: str) -> None:
    """Ask a server for any answer (through proxies, too): libraries would try for much longer. Raises:
    OSError."""
    try:
        requests.head(server, timeout=REACH_TIMEOUT_S)
    except requests.RequestException as error:
        raise OSError(f"no answer from {server}") from error
