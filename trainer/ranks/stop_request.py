"""A request to stop this process: a signal sets a flag, and stop.py has all ranks agree. Light to import."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qwenlora.run.signals import STOP_SIGNALS, to_handle


class StoppedEarly(BaseException):
    """A stop request that came when there was nothing to save."""


class StopRequest:
    """A flag that stop signals set; work under way is finished first. why: the name of the first signal."""

    def __init__(self) -> None:
        self.asked = False
        self.why = ""
        self._raises = False

    def listen(self, *, nohup: bool = False) -> None:
        """Handle stop signals from now on, also a signal that launch/launcher.py blocked until now. nohup:
        SIGHUP stays ignored."""
        for number in to_handle(nohup=nohup):
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ask(self, why: str) -> None:
        """Ask to stop. Only the first reason is kept."""
        if not self.asked:
            self.asked, self.why = True, why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)  # a second Ctrl-C: leave now, without saving
        self.ask(signal.Signals(number).name)
        if self._raises:
            raise StoppedEarly(self.why)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise StoppedEarly at a stop signal while the block runs, or now if a signal came before."""
        if self.asked:
            raise StoppedEarly(self.why)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
