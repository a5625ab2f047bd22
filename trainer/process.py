"""A process of an attempt: what it has from its start on, and how it ends. Light to import."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from qwenlora.configs import Config
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import STACKS_SIGNAL
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.records import RankError
from qwenlora.trainer.ranks.screen import Rank, take_screen
from qwenlora.trainer.ranks.stop_request import StoppedEarly, StopRequest

log = logging.getLogger("qwenlora")
LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class Process:
    """A rank, or the preparation before the ranks. name: of its log, `prepare` or `rank-0`...; captured:
    whether the process takes the screen and handles exceptions, which debuggers do not want."""

    config: Config
    run: RunFolder
    rank: Rank
    request: StopRequest
    handover: Handover
    captured: bool
    name: str
    attempt: int
    console: Console

    @classmethod
    def begin(
        cls,
        config: Config,
        run: RunFolder,
        rank: Rank,
        request: StopRequest,
        handover: Handover,
        *,
        captured: bool,
        prepares: bool,
    ) -> "Process":
        """Return this process, with the screen taken. The run folder knows the attempt by now."""
        name = "prepare" if prepares else f"rank-{rank.rank}"
        attempt = handover.attempt if handover.by_agent else len(run.history.attempts())
        if captured:
            console = take_screen(run.log(attempt, name), speaks=rank.first, lent=handover.screen)
        else:
            console = Console(quiet=not rank.first, markup=False, highlight=False)
        faulthandler.register(STACKS_SIGNAL, chain=False)  # into the log
        return cls(config, run, rank, request, handover, captured, name, attempt, console)

    def exit_code_of(self, work: Callable[["Process"], int]) -> int:
        """Do the work of this process; return its exit code. A failure is recorded and shown, not raised."""
        try:
            return work(self)
        except StoppedEarly as stopped:
            self.run.end_attempt("stopped", str(stopped))
            self.say("stopped while preparing: nothing is lost, the same command starts again")
            return EXIT_CODES["stopped"]
        except Exception as error:
            if not self.captured:
                raise
            ours = type(error).__module__.startswith("qwenlora.")  # then the message needs no traceback
            log.error("%s failed", self.name, exc_info=None if ours else error)
            code = EXIT_CODES["refused" if isinstance(error, ValueError) else "failed"]
            bad_ranks = getattr(error, "bad_ranks", [])  # of a TrainingFault
            self.fail(_message(error, ours=ours), code, ours=ours, bad_ranks=bad_ranks)
            return code

    def say(self, line: str) -> None:
        """Show a line on the screen."""
        self.console.print(line, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Show a warning, and log it."""
        log.warning(line)
        self.console.print(Text("warning: ", style="yellow").append(line, style="default"), soft_wrap=True)

    def fail(self, message: str, code: int, *, ours: bool = True, bad_ranks: Sequence[int] = ()) -> None:
        """Record why this process fails; without an agent, also end the attempt and show the reason. code:
        the process's exit code; ours, bad_ranks: as in RankError."""
        error = RankError(
            process=self.name,
            time=time.time(),
            message=message,
            code=code,
            ours=ours,
            bad_ranks=list(bad_ranks),
        )
        try:
            write_atomically(self.run.error(self.attempt, self.name), error.text())
        except OSError as full:  # the disk is full, or the folder gone
            logs = self.run.logs(self.attempt)
            self.console.print(
                f"error: {message} (and {logs} cannot be written: {full.strerror})", style="red"
            )
        if self.handover.by_agent:  # the agent sees all ranks, and shows which one failed first
            return
        if self.rank.first:
            self.run.end_attempt("refused" if code == EXIT_CODES["refused"] else "failed", message)
            if code == EXIT_CODES["refused"]:
                self.run.put_back()
        self._show_error(message)

    def give_up(self, message: str) -> None:
        """End this process, which hangs in a file operation: writing the reason may hang as well."""
        last_words = threading.Thread(target=self.fail, args=(message, EXIT_CODES["failed"]), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        if last_words.is_alive():
            self._show_error(message)
        os._exit(EXIT_CODES["failed"])

    def _show_error(self, message: str) -> None:
        self.console.print(f"error: {message}", style="red", soft_wrap=True)


def _message(error: BaseException, *, ours: bool) -> str:
    """Return an error as one line: our own text as it is, a library's after its type."""
    if isinstance(error, ValueError) or ours:
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
