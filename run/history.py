"""A run's history: attempts.jsonl, a line an attempt, and progress.json, the current attempt's last step."""

import fcntl
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwenlora.run.disk import write_atomically
from qwenlora.run.records import Attempt, Progress, Reason, now

EXIT_CODES: dict[Reason, int] = {"done": 0, "stopped": 75, "failed": 1, "refused": 2}

_WIDTH = 160  # of progress.json, in bytes: written over in place, so it must not change


class History:
    """The attempts of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "attempts.jsonl"
        self.progress = ProgressFile(folder / "progress.json")

    def attempts(self) -> list[Attempt]:
        """Return the attempts so far, oldest first. Raises: ValueError when a line is no attempt."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return [Attempt.parse(line) for line in lines if line.strip()]

    def last(self) -> Attempt | None:
        """Return the last attempt; None before the first."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    @property
    def unfinished(self) -> Attempt | None:
        """The last attempt, when no process has recorded how it ended."""
        last = self.last()
        return last if last and not last.end else None

    def begin(self, processes: int, *, killed_by: str = "", **facts: Any) -> int:
        """Record an attempt's start, and the end of a killed one before it; return its number, from 1.
        killed_by: Slurm's word for what killed the earlier one; facts: other fields of the new Attempt."""
        with self._alone():
            attempts = self.attempts()
            if attempts and not attempts[-1].end:
                if killed_by:
                    attempts[-1] = attempts[-1].revised(cause=killed_by)
                message = f"Slurm: {killed_by}" if killed_by else ""
                self._close(attempts, "killed", message)
            number = len(attempts) + 1
            where = {"host": socket.gethostname(), "job_id": os.environ.get("SLURM_JOB_ID")}
            values = {"attempt": number, "start": now(), **where, "processes": processes, **facts}
            attempts.append(Attempt.model_validate(values))
            self._write(attempts)
        return number

    def note(self, **facts: Any) -> None:
        """Add to the attempt under way. facts: fields of Attempt."""
        with self._alone():
            if attempts := self.attempts():  # without attempts, the folder is gone
                self._write([*attempts[:-1], attempts[-1].revised(**facts)])

    def end(self, reason: Reason, message: str = "") -> None:
        """Record why the last attempt ended, unless that is known already."""
        with self._alone():
            attempts = self.attempts()
            if attempts and not attempts[-1].end:  # no attempt: the folder was removed
                self._close(attempts, reason, message, now())
                self._write(attempts)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the agent and rank 0 from writing at the same time, where the file system has locks."""
        with ExitStack() as held:
            with suppress(OSError):  # without locks, or without the folder: the window is microseconds
                lock = held.enter_context(self.file.with_name(".attempts.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def so_far(self, reason: Reason | None = None) -> list[Attempt]:
        """Return the attempts as they would be if the last one ended now."""
        attempts = self.attempts()
        if attempts and not attempts[-1].end:
            self._close(attempts, reason, "", now())
        return attempts

    def _close(
        self, attempts: list[Attempt], reason: Reason | None, message: str, end: datetime | None = None
    ) -> None:
        """Give the last attempt its end. end: default: the time of its last step, else of its start."""
        *before, attempt = attempts
        changes: dict[str, Any] = {"reason": reason, "message": message}
        if progress := self.progress.read(attempt.attempt):
            changes |= {
                "last_step": progress.step,
                "trained_s": progress.trained_s,
                "saving_s": progress.saving_s,
            }
            end = end or datetime.fromtimestamp(progress.time, UTC)
            if first := attempt.first_step:
                # a kill may have come before all lost steps were repeated
                trained = max((other.last_step or 0 for other in before), default=0)
                changes["steps_repeated"] = max(min(progress.step, trained) - first + 1, 0)
        attempts[-1] = attempt.revised(**changes, end=end or attempt.start)
        attempts[-1] = attempts[-1].revised(goodput=goodput(attempts))

    def last_step(self) -> int:
        """Return the last step that any attempt trained, saved or not."""
        attempts = self.attempts()
        steps = [attempt.last_step or 0 for attempt in attempts]
        if attempts and not attempts[-1].end and (progress := self.progress.read(attempts[-1].attempt)):
            steps.append(progress.step)
        return max(steps, default=0)

    def first_step_of_the_killed(self) -> int | None:
        """Return the first step of the killed attempts just before this one; None if there are none."""
        first = math.inf
        for attempt in reversed(self.attempts()[:-1]):
            if attempt.reason != "killed":
                break
            first = min(first, attempt.first_step or math.inf)
        return int(first) if first < math.inf else None

    def seconds_since_start(self) -> float:
        """Return the seconds since the start of the last attempt."""
        return (now() - self.attempts()[-1].start).total_seconds()

    def _write(self, attempts: Sequence[Attempt]) -> None:
        write_atomically(self.file, "".join(attempt.text(indent=None) + "\n" for attempt in attempts))


class ProgressFile:
    """progress.json, written over in place: one small write a step and no new file, which a parallel file
    system does not mind, and after a kill it still says how far the attempt came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def write(self, attempt: int, step: int, trained_s: float, saving_s: float) -> None:
        """Record a step. A write that fails is ignored: nothing depends on it."""
        record = Progress(
            attempt=attempt,
            step=step,
            time=round(time.time(), 3),
            trained_s=round(trained_s, 3),
            saving_s=round(saving_s, 3),
        )
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, record.text(indent=None).ljust(_WIDTH - 1).encode() + b"\n", 0)
        except OSError:
            return

    def read(self, attempt: int) -> Progress | None:
        """Return the last step of an attempt; None when it trained none, or the file is damaged."""
        try:
            record = Progress.read(self.path)
        except (OSError, ValueError):
            return None
        return record if record.attempt == attempt else None


def inside_job(attempts: Sequence[Attempt]) -> list[tuple[Attempt, float | None]]:
    """Return the attempts that followed another in the same start of a job, without the queue; with the
    seconds from the other's end until their first step was done, None before that."""
    found: list[tuple[Attempt, float | None]] = []
    for last, one in pairwise(attempts):
        if one.job_id and (last.job_id, last.restarts) == (one.job_id, one.restarts) and last.end:
            between = (one.start - last.end).total_seconds()
            found.append((one, None if one.restart_s is None else between + one.restart_s))
    return found


def goodput(attempts: Sequence[Attempt]) -> float | None:
    """Return the share of the attempts' time that went into steps of the final history; None before any.
    The rest went into start-up, saving, repeated steps, and work cut short. Refused attempts do not count."""
    total = useful = 0.0
    kept_until = math.inf
    for attempt in reversed(attempts):
        if not attempt.end or attempt.reason == "refused":
            continue
        total += (attempt.end - attempt.start).total_seconds()
        first, last = attempt.first_step, attempt.last_step or 0
        if first and last >= first:
            kept = min(last, kept_until) - first + 1
            useful += attempt.trained_s * max(kept, 0) / (last - first + 1)
            kept_until = min(kept_until, first - 1)
    return round(useful / total, 4) if total else None
