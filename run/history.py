"""What happened to a run: attempts.jsonl, one line an attempt, and progress.json, the last step of the one
under way.

{"attempt", "start", "end", "host", "nodes", "job_id", "restarts", "processes", "saved_before", "reason",
"cause", "message", "resumed_from", "first_step", "last_step", "steps_repeated", "seconds": {"start_up",
"data", "model", "first_step"}, "trained_s", "saving_s", "goodput"}. restarts: how often Slurm had requeued
the job. saved_before: the newest checkpoint's step at the start. reason: done, stopped, failed, refused, or
killed: nobody lived to say. cause: what Slurm did to end it, in its own word (TIMEOUT, PREEMPTED, NODE_FAIL,
REQUEUED, CANCELLED), if it did. first_step and last_step are missing where no step was trained.
steps_repeated were trained before, but not saved.
"""

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qwenlora.run.disk import write_atomically

Reason = Literal["done", "stopped", "failed", "refused"]
EXIT_CODES: dict[Reason, int] = {"done": 0, "stopped": 75, "failed": 1, "refused": 2}

_WIDTH = 160  # of progress.json, in bytes: written over in place, so it must not change


class History:
    """The attempts of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "attempts.jsonl"
        self.progress = Progress(folder / "progress.json")

    def attempts(self) -> list[dict[str, Any]]:
        """Return the attempts so far, oldest first."""
        if not self.file.exists():
            return []
        return [
            json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """The last attempt, when nobody has said how it ended."""
        attempts = self.attempts()
        return attempts[-1] if attempts and "end" not in attempts[-1] else None

    def begin(self, processes: int, *, killed_by: str = "", **facts: Any) -> int:
        """Note the start of an attempt; return its number, from 1. An earlier one without an end was killed.

        killed_by: by what, in Slurm's word. facts: what else is known of the new one.
        """
        with self._alone():
            return self._begin(processes, killed_by, facts)

    def _begin(self, processes: int, killed_by: str, facts: dict[str, Any]) -> int:
        attempts = self.attempts()
        if attempts and "end" not in attempts[-1]:
            attempts[-1] |= {"cause": killed_by} if killed_by else {}
            said = f"Slurm: {killed_by}" if killed_by else ""
            self._close(attempts, "killed", said, self.progress.read(attempts[-1]["attempt"]))
        number = len(attempts) + 1
        attempts.append(
            {
                "attempt": number,
                "start": _iso(_now()),
                "host": socket.gethostname(),
                "job_id": os.environ.get("SLURM_JOB_ID"),
                "processes": processes,
            }
            | facts
        )
        self._write(attempts)
        return number

    def note(self, **facts: Any) -> None:
        """Add to the line of the attempt under way."""
        with self._alone():
            attempts = self.attempts()
            attempts[-1] |= facts
            self._write(attempts)

    def end(self, reason: Reason, message: str = "") -> None:
        """Note why the last attempt ended, unless that is known already."""
        with self._alone():
            attempts = self.attempts()
            if attempts and "end" not in attempts[-1]:  # none: the folder is gone
                self._close(attempts, reason, message, self.progress.read(attempts[-1]["attempt"]), _now())
                self._write(attempts)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the agent and rank 0 from writing at the same time, where the file system has locks."""
        with ExitStack() as held:
            with suppress(OSError):  # without locks, or a folder: the window is a few microseconds
                fcntl.flock(
                    held.enter_context(self.file.with_name(".attempts.lock").open("w")), fcntl.LOCK_EX
                )
            yield

    def so_far(self, reason: str) -> list[dict[str, Any]]:
        """Return the attempts as they were if the last one ended now."""
        attempts = self.attempts()
        if attempts and "end" not in attempts[-1]:
            self._close(attempts, reason, "", self.progress.read(attempts[-1]["attempt"]), _now())
        return attempts

    def _close(
        self,
        attempts: list[dict[str, Any]],
        reason: str,
        message: str,
        last: dict[str, Any],
        end: float | None = None,
    ) -> None:
        attempt = attempts[-1]
        if last:
            attempt |= {
                "last_step": last["step"],
                "trained_s": last["trained_s"],
                "saving_s": last["saving_s"],
            }
            end = end or last["time"]
            if first := attempt.get("first_step"):  # it may not have come to all of them
                before = max((one.get("last_step", 0) for one in attempts[:-1]), default=0)
                attempt["steps_repeated"] = max(min(last["step"], before) - first + 1, 0)
        attempt |= {"end": _iso(end) if end else attempt["start"], "reason": reason, "message": message}
        attempt["goodput"] = goodput(attempts)

    def last_step(self) -> int:
        """Return the last step that any attempt trained, saved or not."""
        attempts = self.attempts()
        steps = [attempt.get("last_step", 0) for attempt in attempts]
        running = [
            self.progress.read(attempt["attempt"]).get("step", 0)
            for attempt in attempts
            if "end" not in attempt
        ]
        return max([*steps, *running], default=0)

    def first_step_of_the_killed(self) -> int | None:
        """Return the first step of the attempts just before the one under way that were killed; None without
        such."""
        first = None
        for attempt in reversed(self.attempts()[:-1]):
            if attempt["reason"] != "killed":
                break
            first = min(first or math.inf, attempt.get("first_step", math.inf))
        return int(first) if first and first < math.inf else None

    def seconds_since_start(self) -> float:
        """Return the seconds since the start of the last attempt."""
        return _now() - _time(self.attempts()[-1]["start"])

    def _write(self, attempts: list[dict[str, Any]]) -> None:
        write_atomically(
            self.file, "".join(json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in attempts)
        )


class Progress:
    """The last step of an attempt: {"attempt", "step", "time", "trained_s", "saving_s"}, written over in
    place.

    One small write a step and no new file: a parallel file system does not mind, and a killed attempt has
    still said how far it came.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def write(self, attempt: int, step: int, trained_s: float, saving_s: float) -> None:
        """Note a step. What fails is let go: nothing depends on it."""
        record = {"attempt": attempt, "step": step, "time": round(_now(), 3)}
        record |= {"trained_s": round(trained_s, 3), "saving_s": round(saving_s, 3)}
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, json.dumps(record).ljust(_WIDTH - 1).encode() + b"\n", 0)
        except OSError:
            return

    def read(self, attempt: int) -> dict[str, Any]:
        """Return the last step of an attempt; {} when it trained none."""
        try:
            record: dict[str, Any] = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return record if record.get("attempt") == attempt else {}


def goodput(attempts: list[dict[str, Any]]) -> float | None:
    """Return the share of the attempts' time that went into steps of the final history; None before any.

    The rest was start-up, saving, steps that were trained again, and what was under way when an attempt was
    killed.
    """
    total = useful = 0.0
    kept_until = float("inf")
    for attempt in reversed(attempts):
        if "end" not in attempt or attempt.get("reason") == "refused":
            continue
        total += _time(attempt["end"]) - _time(attempt["start"])
        if attempt.get("first_step") and attempt.get("last_step", 0) >= attempt["first_step"]:
            trained = attempt["last_step"] - attempt["first_step"] + 1
            kept = min(attempt["last_step"], kept_until) - attempt["first_step"] + 1
            useful += attempt.get("trained_s", 0.0) * max(kept, 0) / trained
            kept_until = min(kept_until, attempt["first_step"] - 1)
    return round(useful / total, 4) if total else None


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _time(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()
