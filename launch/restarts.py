"""Whether a job that failed is worth another attempt."""

from qwenlora.run.records import Attempt

IN_VAIN = 2  # failures in a row that saved nothing new: the next would do the same
MOST_IN_VAIN = 10  # attempts in a row that saved no step: their time is too short, or nodes keep dying


def worth_another(
    attempts: list[Attempt], job_id: str | None, max_restarts: int, newest_step: int
) -> tuple[bool, str]:
    """Return whether to run the job again after its last attempt failed, and why, for the user. Only this
    job's attempts count: who submits again wants it tried again. newest_step: of the newest checkpoint."""
    in_vain = _without_progress(attempts, job_id, newest_step)
    failures = sum(_crashed(attempt) for attempt in attempts if attempt.job_id == job_id)
    # what a bad node did is no crash; but where it goes on without that node, the node was not the reason
    blamed = sum(bool(attempt.bad) for attempt in in_vain)
    crashes = sum(map(_crashed, in_vain)) + max(0, blamed - 1)
    if crashes >= IN_VAIN:
        return False, f"not tried again: {crashes} attempts failed in a row and saved no step (a crash loop)"
    if len(in_vain) >= MOST_IN_VAIN:
        return False, f"not tried again: {len(in_vain)} attempts in a row have saved no step"
    if failures > max_restarts:
        count = "1 attempt" if failures == 1 else f"{failures} attempts"
        return False, f"not tried again: {count} failed, launch.max_restarts is {max_restarts}"
    then = f"goes on from step {newest_step}" if newest_step else "starts from the first step"
    return True, f"trying again: attempt {len(attempts) + 1} {then}"


def in_vain(attempts: list[Attempt], job_id: str | None, newest_step: int) -> int:
    """Return how many attempts of the job in a row, up to the last, have saved no step."""
    return len(_without_progress(attempts, job_id, newest_step))


def _without_progress(attempts: list[Attempt], job_id: str | None, newest_step: int) -> list[Attempt]:
    """Return the job's attempts since the last one that saved a step."""
    of_job = [attempt for attempt in attempts if attempt.job_id == job_id]
    saved = [*(attempt.saved_before for attempt in of_job), newest_step]  # before each attempt, and now
    progressed = [number for number in range(len(of_job)) if saved[number + 1] > saved[number]]
    return of_job[max(progressed, default=-1) + 1 :]


def _crashed(attempt: Attempt) -> bool:
    """Whether it failed by itself: not because a node was lost or bad."""
    return attempt.reason == "failed" and not (attempt.cause or attempt.lost or attempt.bad)
