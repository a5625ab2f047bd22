"""How an attempt ended: what the user reads, what the history records, and the exit code."""

import signal

from rich.console import Console

from qwenlora.launch.children import Children
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.rank_deaths import first_killed
from qwenlora.run.records import RankError, Reason

TAIL_LINES = 15
NAMES = {"prepare": "the preparation", "forkserver": "the process that ranks are forked from"}


def conclude(
    folder: RunFolder,
    attempt: int,
    code: int,
    children: Children,
    console: Console,
    *,
    fault: str = "",
    cause: str = "",
) -> int:
    """Record how the attempt ended, tell the user, and return the exit code. code: of this node's processes;
    fault: what the agents saw go wrong, if anything; cause: why Slurm ended it (causes.py)."""
    last = folder.history.last()  # None: the run folder is gone
    reason = last.reason if last else None
    if reason is None:  # rank 0 could not record it
        if code == 0 and not fault and not children.stop_requested and folder.adapter.exists():
            return EXIT_CODES["done"]
        reason, message = _explain_end(folder, attempt, code, children, console, fault)
        folder.end_attempt(reason, message)
    elif reason == "stopped" and children.stop_requested:
        # the agent stops ranks by SIGTERM, whichever signal it got
        folder.note_attempt(message=children.stop_signal)
    if cause:
        folder.note_attempt(cause=None if reason == "done" else cause)
    return EXIT_CODES[reason]


def _explain_end(
    folder: RunFolder, attempt: int, code: int, children: Children, console: Console, fault: str
) -> tuple[Reason, str]:
    """Tell the user why the attempt ended; return that as reason and message."""
    error = first_error(folder, attempt)
    if children.stop_requested and not error and not fault:
        newest = next((path.name for path in folder.checkpoints()), "")
        then = f"goes on from {newest}" if newest else "starts again"
        console.print(f"stopped before anything of this attempt was saved; the same command {then}")
        return "stopped", f"{children.stop_signal}: before it saved anything"
    if error and error.code == EXIT_CODES["refused"] and not fault:
        console.print(f"error: {error.message}", style="red", soft_wrap=True)
        return "refused", error.message
    if fault:
        error = None
    message = fault or (
        error.message if error else f"a process ended without an error message (exit code {code})"
    )
    explain_failure(folder, attempt, message, error, console, tail=not fault)
    return "failed", message


def first_error(folder: RunFolder, attempt: int) -> RankError | None:
    """Return the error of the rank that failed first: the others mostly fail because it did. A rank that was
    killed could not write its error; the launcher's log reports it."""
    errors = folder.errors(attempt)
    for log in sorted(folder.logs(attempt).glob("launch*.log")):  # one for each node
        if not (killed := first_killed(log.read_text(encoding="utf-8", errors="replace"))):
            continue
        process, number = killed
        # launchers end the other ranks by SIGTERM; a rank that has written its error died of that
        if number != signal.SIGTERM and process not in {error.process for error in errors}:
            who = NAMES.get(process, process.replace("-", " "))
            message = f"{who} was killed by {signal.Signals(number).name}, not by qwenlora"
            if number == signal.SIGKILL:
                message += ": by hand, by the scheduler, or for lack of memory (dmesg says)"
            ranks = [int(process.removeprefix("rank-"))] if process.startswith("rank-") else []
            return RankError(process=process, time=0.0, message=message, code=1, ours=False, bad_ranks=ranks)
    return min(errors, key=lambda error: error.time, default=None)


def explain_failure(
    folder: RunFolder,
    attempt: int,
    message: str,
    error: RankError | None,
    console: Console,
    *,
    tail: bool = True,
) -> None:
    """Print why the attempt failed, with the last lines of the log of the process that failed first."""
    log = folder.log(attempt, error.process if error else "launch")
    console.print(f"failed: {message}", style="red", soft_wrap=True)
    if not tail or not log.exists() or (error and error.ours):
        return
    console.print(f"the last lines of {log}:", soft_wrap=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]:
        console.print(f"  {line}", soft_wrap=True)
