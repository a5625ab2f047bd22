"""A job as its owner sees it: the run folder, its attempts and their history, submission."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenlora.jobs.submission.submit import submit as submit
    from qwenlora.jobs.submission.submit import submit_sweep as submit_sweep


def __getattr__(name: str) -> Any:
    """Import submitit where it is asked for: most of what imports this room submits nothing."""
    if name not in ("submit", "submit_sweep"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qwenlora.jobs.submission import submit as submission

    return getattr(submission, name)
