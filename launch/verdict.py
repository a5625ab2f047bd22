"""How an attempt ended: what the user is told of it, what history keeps, and the exit code."""

import re
import signal

from rich.console import Console

from qwenlora.launch.children import Children
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.records import RankError

TAIL_LINES = 15
# in torchrun's report of a failure; an exit code below 0 is a signal
_FIRST_KILLED = re.compile(r"\(first observed failure\):.*?rank\s+: (\d+).*?exitcode\s+: -(\d+)", re.DOTALL)


def killed_line(rank: int, number: int) -> str:
    """Return what an agent that saw a rank end by a signal writes to its log: as torchrun would."""
    return f"(first observed failure): rank : {rank} exitcode : -{number}\n"


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
    """Note how the attempt ended, tell the user what they need to know, return the exit code.

    code: of the processes on this node; fault: what the agents saw to go wrong, if anything; cause: what
    Slurm did, in its word.
    """
    attempts = folder.history.attempts()
    reason = attempts[-1].reason if attempts else None  # none: the run folder is gone
    if reason is None:  # rank 0 did not live to say
        error = first_error(folder, attempt)
        message = fault or (error.message if error else f"a process ended without a word (exit code {code})")
        if (
            code == 0 and not fault and not children.asked and folder.adapter.exists()
        ):  # it could not be noted
            return EXIT_CODES["done"]
        if children.asked and not error and not fault:
            reason, message = "stopped", f"{children.why}: before it saved anything"
            newest = next((path.name for path in folder.checkpoints()), "")
            then = f"goes on from {newest}" if newest else "starts again"
            console.print(f"stopped before anything of this attempt was saved; the same command {then}")
        elif error and error.code == 2 and not fault:
            reason = "refused"
            console.print(f"error: {message}", style="red", soft_wrap=True)
        else:
            reason = "failed"
            explain(folder, attempt, message, None if fault else error, console, tail=not fault)
        folder.end_attempt(reason, message)
    elif reason == "stopped" and children.asked:
        folder.note_attempt(message=children.why)  # ranks are told to stop by SIGTERM, whoever asked
    if cause:
        folder.note_attempt(cause=None if reason == "done" else cause)
    return EXIT_CODES[reason]


def first_error(folder: RunFolder, attempt: int) -> RankError | None:
    """Return the error of the rank that failed first: the others mostly fail because it did.

    A rank that was killed could not say so; torchrun knows.
    """
    errors = folder.errors(attempt)
    for log in sorted(folder.logs(attempt).glob("launch*.log")):  # one a node
        if not (killed := _FIRST_KILLED.search(log.read_text(encoding="utf-8", errors="replace"))):
            continue
        rank, number = f"rank-{killed[1]}", int(killed[2])
        # one that has said why may be met by a signal while it leaves
        if number != signal.SIGTERM and rank not in {error.process for error in errors}:
            message = f"{rank.replace('-', ' ')} was killed by {signal.Signals(number).name}, not by qwenlora"
            if number == signal.SIGKILL:
                message += ": by hand, by the scheduler, or for want of memory (dmesg says)"
            return RankError(process=rank, time=0.0, message=message, code=1, ours=False)
    return min(errors, key=lambda error: error.time, default=None)


def explain(
    folder: RunFolder,
    attempt: int,
    message: str,
    error: RankError | None,
    console: Console,
    *,
    tail: bool = True,
) -> None:
    """Say why the attempt failed, with the last lines of the log of the process that failed first."""
    log = folder.log(attempt, error.process if error else "launch")
    console.print(f"failed: {message}", style="red", soft_wrap=True)
    if not tail or not log.exists() or (error and error.ours):
        return
    console.print(f"the last lines of {log}:", soft_wrap=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]:
        console.print(f"  {line}", soft_wrap=True)
