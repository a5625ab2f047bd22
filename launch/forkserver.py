"""The agent's side of trainer/forkserver.py, which imports the libraries once, and forks preparation and
ranks."""

import json
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from qwenlora.launch.children import environment_of, prepare_child
from qwenlora.run.folder import PREPARE_ONLY, RunFolder
from qwenlora.run.handover import Start
from qwenlora.run.rank_deaths import ENDED_HERE, killed_line

MODULE = "qwenlora.trainer.forkserver"


class Forkserver:
    """A process that starts others for this node. It imports from the moment this is made."""

    def __init__(self, folder: RunFolder, processes: int) -> None:
        """folder: of the run; processes: ranks of this node."""
        self._folder, self._processes = folder, processes
        self._begin()

    def _begin(self) -> None:
        self._used = False
        self._early_log = tempfile.TemporaryFile()  # noqa: SIM115  there may be no attempt with a log yet
        self.answers, its_end = socket.socketpair()
        with its_end:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-u", "-m", MODULE, str(self._folder.config)],  # it shows whose it is
                env=environment_of(self._processes),
                stdin=its_end.fileno(),
                stderr=self._early_log,
                start_new_session=True,
                preexec_fn=prepare_child,
            )

    def close(self) -> None:
        """End the process, and what it started; again, it does nothing."""
        self.process.kill()
        self.process.wait()
        self.answers.close()
        self._early_log.close()

    def prepare(self, attempt: int, variables: dict[str, str]) -> "Forked":
        """Start the preparation. variables: for its environment."""
        return self._start(attempt, "launch", [PREPARE_ONLY], [variables])

    def train(self, attempt: int, log: str, variables: list[dict[str, str]]) -> "Forked":
        """Start the ranks. log: the name of the launch log; variables: for the environment of each."""
        return self._start(attempt, log, [], variables)

    def copy_early_log(self, log: Path) -> None:
        """Append to a log what the process wrote before it was told of one."""
        self._early_log.seek(0)
        with log.open("ab") as file:
            file.write(self._early_log.read())

    def _start(self, attempt: int, log: str, options: list[str], variables: list[dict[str, str]]) -> "Forked":
        if self._used and self.process.poll() is not None:  # killed in an earlier attempt, which has said so
            self.close()
            self._begin()
        self._used = True
        start = Start([str(self._folder.config), *options], str(self._folder.log(attempt, log)), variables)
        with suppress(ConnectionError):  # it has ended, which Forked.poll sees
            self.answers.sendall(start.line())
        return Forked(self, start)


class Forked:
    """Processes that a forkserver was told to start, as children.py runs them."""

    def __init__(self, server: Forkserver, start: Start) -> None:
        self._server, self._start = server, start
        self._received = b""
        self._reported = self._killed = False
        self._descendants: set[psutil.Process] = set()  # those that were killed

    def poll(self) -> int | None:
        """Return the exit code of the first process that failed, else 0; None while they run."""
        if any(map(_runs, self._descendants)):
            return None
        if (answer := self._answer("ended")) is not None:
            return answer
        if (code := self._server.process.poll()) is None:
            return None
        log = Path(self._start.log)
        self._server.copy_early_log(log)
        if code < 0 and not self._killed:
            with log.open("a", encoding="utf-8") as file:
                file.write(killed_line("forkserver", -code))
        return code

    def reports_failure(self) -> bool:
        """Whether a process has failed, while others may still run; true once."""
        reports = not self._reported and self._answer("failed") is not None
        self._reported |= reports
        return reports

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that run; none while it prepares."""
        return [] if PREPARE_ONLY in self._start.arguments else self._children()

    def kill(self) -> None:
        """Kill all that was started. They are gone when poll returns a code. The forkserver stays, for the
        next attempt, unless it has started nothing: then it may still import."""
        if not self._killed:
            with suppress(OSError), Path(self._start.log).open("a", encoding="utf-8") as file:
                file.write(ENDED_HERE)  # the forkserver reports those that are killed now, too
        self._killed = True
        if not (found := self._children(recursive=True)):
            self._server.process.kill()
        self._descendants.update(found)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _children(self, *, recursive: bool = False) -> list[psutil.Process]:
        try:
            return psutil.Process(self._server.process.pid).children(recursive)
        except psutil.NoSuchProcess:
            return []

    def _answer(self, what: str) -> int | None:
        with suppress(BlockingIOError, ConnectionError):
            self._received += self._server.answers.recv(4096, socket.MSG_DONTWAIT)
        answers = [json.loads(line) for line in self._received.split(b"\n")[:-1]]
        return next((int(answer[what]) for answer in answers if what in answer), None)


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; who is to collect it may never do so, as in some containers."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
