"""Whether a job that failed is worth another attempt, and what ended one that nobody lived to tell of."""

from qwenlora.run.records import Attempt
from qwenlora.slurm import query as answers

IN_VAIN = 2  # failures in a row that saved nothing new: the next would do the same
_OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REQUEUED",
    "TIMEOUT",
)
_CLOCKS_S = 5.0  # Slurm keeps whole seconds, and may have another clock


def worth_another(
    attempts: list[Attempt], job_id: str | None, max_restarts: int, newest_step: int
) -> tuple[bool, str]:
    """Return whether to run the job again after its last attempt failed, and why, for the user.

    newest_step: of the newest checkpoint, now. Only attempts of this job count: who submits again wants it
    tried again.
    """
    failures = sum(_crashed(attempt) for attempt in attempts if attempt.job_id == job_id)
    crashes = sum(map(_crashed, _without_progress(attempts, job_id, newest_step)))
    if crashes >= IN_VAIN:
        return False, f"not tried again: {crashes} attempts failed in a row and saved no step (a crash loop)"
    if failures > max_restarts:
        count = "1 attempt" if failures == 1 else f"{failures} attempts"
        return False, f"not tried again: {count} failed, launch.max_restarts is {max_restarts}"
    then = f"goes on from step {newest_step}" if newest_step else "starts from the first step"
    return True, f"trying again: attempt {len(attempts) + 1} {then}"


def in_vain(attempts: list[Attempt], job_id: str | None, newest_step: int) -> int:
    """Return how many attempts of the job in a row have saved no step."""
    return len(_without_progress(attempts, job_id, newest_step))


def _without_progress(attempts: list[Attempt], job_id: str | None, newest_step: int) -> list[Attempt]:
    mine = [attempt for attempt in attempts if attempt.job_id == job_id]
    marks = [*(attempt.saved_before for attempt in mine), newest_step]
    last_progress = max(
        (number for number in range(len(mine)) if marks[number + 1] > marks[number]), default=-1
    )
    return mine[last_progress + 1 :]


def end_of(attempt: Attempt) -> str:
    """Return what Slurm did to end an attempt that was killed, in its word; empty where it does not say."""
    past = answers.history(attempt.job_id) if attempt.job_id else []
    if attempt.restarts >= len(past):
        return ""
    state = past[attempt.restarts].state
    return "" if state in answers.UNDER_WAY else state


def _crashed(attempt: Attempt) -> bool:
    """Whether it failed by itself: not because Slurm lost a node."""
    return attempt.reason == "failed" and not attempt.cause
