"""A rank among its surroundings: who it is, who has the screen, and who asked it to stop. Light to import.

Rank 0's console has the screen; everything that libraries print goes to the ranks' log files instead.
"""

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console

from qwenlora.run.lent_screen import borrow

log = logging.getLogger("qwenlora")
PLAIN_WIDTH = 120


class Rank(NamedTuple):
    """This process among the others, as the launcher says; alone, when it says nothing."""

    rank: int
    world_size: int

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


class StoppedEarly(BaseException):
    """A stop request that came when there was nothing to save."""


class StopRequest:
    """A flag that stop signals set, and nothing else: what is under way is finished first. why: who asked."""

    def __init__(self) -> None:
        self.asked = False
        self.why = ""
        self._at_once = False

    def listen(self) -> None:
        """Hear the signals from now on, also one that came while they were held back (launch/children.py)."""
        requests = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        for number in requests:
            signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, requests)

    def ask(self, why: str) -> None:
        """Ask to stop."""
        if not self.asked:
            self.asked, self.why = True, why

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)  # Ctrl-C, again: at once, without saving
        self.ask(signal.Signals(number).name)
        if self._at_once:
            raise StoppedEarly(self.why)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise StoppedEarly at a signal, instead of finishing first."""
        if self.asked:
            raise StoppedEarly(self.why)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


def take_screen(file: Path, *, speaks: bool, lent: str = "") -> Console:
    """Send all that this process prints, crashes included, to file; return the console that still has the
    screen.

    speaks: false gives a console that is silent, for ranks other than 0. lent: where the screen is, if the
    agent lends it.
    """
    screen = os.fdopen(borrow(lent if speaks else ""), "w", encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    log.setLevel(logging.INFO)
    width = None if screen.isatty() else PLAIN_WIDTH
    # no markup: what is printed holds the user's names and texts
    return Console(file=screen, quiet=not speaks, width=width, markup=False, highlight=False)
