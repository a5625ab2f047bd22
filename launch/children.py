"""Child processes of an agent: run one after the other, stopped together, never left behind.

A scheduler signals every process of a job, a terminal only the agent. Both must end the same way: the ranks
finish their step and save. So children start with the stop signals ignored, and the agent repeats a request
to the ranks until they have left.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

import psutil

from qwenlora.launch.guard import TICKS
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.signals import STOP_SIGNALS, to_handle, under_nohup

GUARD = "qwenlora.launch.guard"
POLL_S = 0.1
DYING_S = 60.0  # from KILL to the end of a process; longer: it hangs in a driver, or on a disk
REPEAT_S = 1.0  # a rank that still imports its modules does not handle signals yet


class Running(Protocol):
    """What an agent runs on its node: the preparation, or the ranks."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that run."""

    def kill(self) -> None:
        """Kill it, with all its descendants."""


class Children:
    """Runs preparation and ranks, and receives stop signals. stop_signal: the name of the first that came;
    immortal: what was killed does not end, so nothing can be started in its place."""

    def __init__(self) -> None:
        self.stop_requested = self.immortal = False
        self.stop_signal = ""
        self._kill_now = False
        self._kill_command = False
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._handlers_before = {
                number: signal.signal(number, self._on_signal) for number in to_handle(nohup=under_nohup())
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._kill_now = self.stop_requested and number == signal.SIGINT  # Ctrl-C again
        self.stop_signal = self.stop_signal or signal.Signals(number).name
        self.stop_requested = True

    def kill(self) -> None:
        """Kill what runs."""
        self._kill_command = True

    def run(
        self, running: Running, poll: Callable[[], None], pause: Callable[[float], None] = time.sleep
    ) -> int:
        """Watch what runs to its end, or until it does not end though it was killed; return its exit code.
        poll: called several times a second, may call kill."""
        self._kill_command = False
        last_request, first_kill = float("-inf"), float("inf")
        while (code := running.poll()) is None:
            poll()
            if time.monotonic() > first_kill + DYING_S:
                self.immortal = True
                return EXIT_CODES["failed"]
            if self._kill_now or self._kill_command:
                first_kill = min(first_kill, time.monotonic())
                running.kill()
            elif self.stop_requested and time.monotonic() - last_request > REPEAT_S:
                self._request_stop(running, first=last_request < 0)
                last_request = time.monotonic()
            pause(POLL_S)
        return code

    def _request_stop(self, running: Running, *, first: bool) -> None:
        ranks = running.ranks()
        if not ranks:  # nothing is trained yet, so there is nothing to save
            running.kill()
        elif first:
            hint = "; Ctrl-C again stops at once, without saving" * (self.stop_signal == "SIGINT")
            print(f"\nstopping: the current step is finished and saved first{hint}", flush=True)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)


def environment_of(ranks: int) -> dict[str, str]:
    """Return the environment of a process that starts so many ranks on this machine."""
    # without PYTHONSAFEPATH, `python -m` takes a random.py of the working folder for Python's own
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    if ranks > 1:  # as torchrun does: otherwise each rank would take all cores
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def prepare_child() -> None:
    """Make a process that is about to start ignore stop signals, and end with this one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


@contextmanager
def guarded(limit_s: float) -> Iterator[None]:
    """Have this process killed when its main thread has not run for so long. A timer's signal (SIGALRM, which
    must have no other use) has that thread write bytes. It does so wherever it waits, but for a disk. Nothing
    is done on another thread, where Python sets no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)

    def show_life(*_: object) -> None:
        with suppress(OSError):  # the guard is gone, or reads late
            os.write(ours, b".")

    before = signal.signal(signal.SIGALRM, show_life)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})  # a parent may have blocked it
    guard = subprocess.Popen(
        [sys.executable, "-m", GUARD, str(limit_s)],
        env=environment_of(1),
        stdin=theirs,
        start_new_session=True,
        preexec_fn=prepare_child,
    )
    os.close(theirs)
    signal.setitimer(signal.ITIMER_REAL, limit_s / TICKS, limit_s / TICKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        guard.kill()
        guard.wait()
        os.close(ours)
