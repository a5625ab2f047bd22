"""A run as a job: submitted, found by its name, shown and cancelled."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenlora.jobs.submission.submit import submit as submit
    from qwenlora.jobs.submission.submit import submit_sweep as submit_sweep


def __getattr__(name: str) -> Any:
    """Import submitit only to submit: most importers of this package do not."""
    if name not in ("submit", "submit_sweep"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qwenlora.jobs.submission import submit as submission

    return getattr(submission, name)
