"""Child processes of the agent: run one after another, told to stop together, and none left behind.

A scheduler signals every process of a job, a terminal only the agent. Both must end the same way: the ranks
finish their step and save. So the children start with these signals ignored (torchrun would die of USR1, and
would kill the ranks on TERM), and the agent passes a request on to the ranks until they have left.
DeepSpeed's launcher brings
handlers of its own, which kill ranks that are not done in half a minute: for it the signals are blocked,
which handlers do not change. Its ranks inherit that, and unblock them when they can hear (trainer/screen.py).
"""

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import IO

import psutil

from qwenlora.run.folder import PREPARE_ONLY
from qwenlora.run.orphans import die_with_parent

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RANK_MODULE = "qwenlora.trainer.main"
POLL_S = 0.1
REPEAT_S = 1.0  # a rank that is still being imported cannot hear yet


class Children:
    """Runs commands and hears stop requests. asked: there was one, why: the first; at_once: and then Ctrl-C
    again."""

    def __init__(self) -> None:
        self.asked = False
        self.why = ""
        self.at_once = False
        self._end_now = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._before = {number: signal.signal(number, self._hear) for number in REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.asked and number == signal.SIGINT
        self.why = self.why or signal.Signals(number).name
        self.asked = True

    def kill(self) -> None:
        """End the command under way at once, with all its descendants."""
        self._end_now = True

    def run(
        self,
        argv: list[str],
        environment: dict[str, str],
        log: IO[bytes],
        watch: Callable[[], None] = lambda: None,
        *,
        pause: Callable[[float], None] = time.sleep,
        apart: bool = False,
    ) -> int:
        """Run a command to its end; return its exit code. log: takes its standard error, the screen its
        output.

        watch: is called several times a second, after each pause, and may call kill. apart: for a command
        that has
        handlers of signals and much to say: it hears none, and its output goes to the log, too.
        """
        self._end_now = False
        process = subprocess.Popen(
            argv,
            env=environment,
            stdout=log if apart else None,
            stderr=log,
            start_new_session=True,
            preexec_fn=_prepare_deaf_child if apart else prepare_child,
        )
        last = float("-inf")
        while process.poll() is None:
            watch()
            if self.at_once or self._end_now:
                _kill(process)
            elif self.asked and time.monotonic() - last > REPEAT_S:
                self._pass_on(process, first=last < 0)
                last = time.monotonic()
            pause(POLL_S)
        return process.returncode

    def _pass_on(self, process: subprocess.Popen[bytes], *, first: bool) -> None:
        ranks = [child for child in _descendants(process) if _is_rank(child)]
        if not ranks:  # nothing has been trained that could be saved
            _kill(process)
        elif first:
            again = "; Ctrl-C again stops at once, without saving" * (self.why == "SIGINT")
            print(f"\nstopping: a step that is under way is finished and saved first{again}", flush=True)
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue  # it has left


def prepare_child() -> None:
    """Have a process that is about to start ignore stop requests, and end with this one."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def _prepare_deaf_child() -> None:
    prepare_child()
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_rank(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return RANK_MODULE in command and PREPARE_ONLY not in command


def _kill(process: subprocess.Popen[bytes]) -> None:
    for child in _descendants(process):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.kill()
