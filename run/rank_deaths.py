"""The line in a launch log that says which process a signal killed: it could not say so itself."""

import re

ENDED_HERE = "\nwhat runs here is killed by its agent\n"  # so later lines report no death that needs a reason
_KILLED = re.compile(r"^(rank-\d+|prepare|forkserver) was killed by signal (\d+)$", re.MULTILINE)


def killed_line(process: str, number: int) -> str:
    """Return the line for a process that a signal killed, whatever is before it in the log. process: `rank-0`
    ..., `prepare` or `forkserver`."""
    return f"\n{process} was killed by signal {number}\n"


def first_killed(log: str) -> tuple[str, int] | None:
    """Return (process, signal) of the first process that a log reports as killed, before its agent killed the
    others; else None."""
    match = _KILLED.search(log.partition(ENDED_HERE)[0])
    return (match[1], int(match[2])) if match else None
