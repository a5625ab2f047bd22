"""Child processes of an agent: run one after the other, stopped together, never left behind.

A scheduler signals every process of a job, a terminal only the agent. Both must end the same way: the ranks
finish their step and save. So children start with the stop signals ignored (torchrun would die of USR1, and
would kill the ranks on TERM), and the agent repeats a request to the ranks until they have left. DeepSpeed's
launcher sets its own handlers, which kill ranks that are not done within half a minute: for it, the signals
are blocked. Its ranks inherit that, and unblock them once they can handle them (trainer/ranks).
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
from qwenlora.run.signals import STOP_SIGNALS, to_handle, under_nohup

RANK_MODULE = "qwenlora.trainer.main"
POLL_S = 0.1
REPEAT_S = 1.0  # a rank that still imports its modules does not handle signals yet


class Children:
    """Runs commands, and receives stop signals. stop_signal: the name of the first that came."""

    def __init__(self) -> None:
        self.stop_requested = False
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
        """Kill the running command, with all its descendants."""
        self._kill_command = True

    def run(
        self,
        argv: list[str],
        environment: dict[str, str],
        log: IO[bytes],
        poll: Callable[[], None],
        *,
        pause: Callable[[float], None] = time.sleep,
        isolated: bool = False,
    ) -> int:
        """Run a command to its end; return its exit code.

        log: gets its standard error; its output goes to the screen. poll: called several times a second, may
        call kill. isolated: for a command that has its own signal handlers and prints much: it gets no stop
        signal, and its output goes to the log, too.
        """
        self._kill_command = False
        process = subprocess.Popen(
            argv,
            env=environment,
            stdout=log if isolated else None,
            stderr=log,
            start_new_session=True,
            preexec_fn=_prepare_isolated_child if isolated else prepare_child,
        )
        last_request = float("-inf")
        while process.poll() is None:
            poll()
            if self._kill_now or self._kill_command:
                _kill(process)
            elif self.stop_requested and time.monotonic() - last_request > REPEAT_S:
                self._request_stop(process, first=last_request < 0)
                last_request = time.monotonic()
            pause(POLL_S)
        return process.returncode

    def _request_stop(self, process: subprocess.Popen[bytes], *, first: bool) -> None:
        ranks = [child for child in _descendants(process) if _is_rank(child)]
        if not ranks:  # nothing is trained yet, so there is nothing to save
            _kill(process)
        elif first:
            hint = "; Ctrl-C again stops at once, without saving" * (self.stop_signal == "SIGINT")
            print(f"\nstopping: the current step is finished and saved first{hint}", flush=True)
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue


def prepare_child() -> None:
    """Make a process that is about to start ignore stop signals, and end with this one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def _prepare_isolated_child() -> None:
    prepare_child()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


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
