"""A run's state is what docs/run-states.md says: each row of its table has a case here."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from qwenlora.run.records import Attempt
from qwenlora.run.state import SILENT_S, state_of
from qwenlora.slurm.query import JobInfo

PAGE = Path(__file__).parents[2] / "docs" / "run-states.md"
START = datetime(2026, 1, 1, tzinfo=UTC)


def table() -> dict[str, str]:
    """Return {situation: state} of the page."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 2 for row in rows)
    assert len({situation for situation, _ in rows}) == len(rows)
    return dict(rows)


def attempts(*reasons: str | None, job_id: str | None = None) -> list[Attempt]:
    """Return an attempt for each reason; None: without an end."""
    return [
        Attempt(attempt=number, start=START, end=START if reason else None, reason=reason, job_id=job_id)
        for number, reason in enumerate(reasons, 1)
    ]


PENDING, RUNNING = JobInfo("7", "PENDING"), JobInfo("7", "RUNNING")
STOPPING = JobInfo("7", "CANCELLED", completing=True)
OVER, LOST = JobInfo("7", "COMPLETED"), JobInfo("7", "NODE_FAIL")
OPEN = "an attempt without an end"  # how these rows begin
IN_JOB = attempts("killed", None, job_id="7")
CASES = {
    "nothing was trained, and no job is under way": {"attempts": [], "trained": False},
    "the job ended before its first attempt": {"attempts": [], "trained": False, "job": OVER},
    "submitted; Slurm has not started the job": {"attempts": [], "trained": False, "job": PENDING},
    "the job runs; its first attempt is not recorded yet": {"attempts": [], "trained": False, "job": RUNNING},
    "a local job's process is alive; its first attempt is not recorded yet": {
        "attempts": [],
        "trained": False,
        "local_job_is_alive": True,
    },
    "only refused attempts": {"attempts": attempts("refused", "refused"), "trained": False, "job": OVER},
    "only refused attempts; submitted again, and the job is pending": {
        "attempts": attempts("refused"),
        "trained": False,
        "job": PENDING,
    },
    f"{OPEN}; its process is alive on this machine": {"attempts": attempts(None), "holder_is_alive": True},
    f"{OPEN}, on this machine; another job is pending": {
        "attempts": attempts(None),
        "holder_is_alive": True,
        "job": PENDING,
    },
    f"{OPEN}; its job runs": {"attempts": IN_JOB, "job": RUNNING, "silent_s": 10 * SILENT_S},
    f"{OPEN}; its job is being stopped": {"attempts": IN_JOB, "job": STOPPING},
    f"{OPEN}; its process on this machine is gone": {"attempts": attempts(None), "holder_is_alive": False},
    f"{OPEN}; its node died, and Slurm says NODE_FAIL": {"attempts": IN_JOB, "job": LOST},
    f"{OPEN}; its node died, and its job is pending again": {"attempts": IN_JOB, "job": PENDING},
    f"{OPEN}, on another machine; no job; it wrote to the folder within the last hour": {
        "attempts": attempts(None),
        "silent_s": SILENT_S - 1,
    },
    f"{OPEN}, on another machine; no job; silent for an hour": {
        "attempts": attempts(None),
        "silent_s": SILENT_S,
    },
    f"{OPEN}, started by hand on another machine after a job had ended": {
        "attempts": [*attempts("stopped", job_id="7"), *attempts(None)],
        "job": OVER,
    },
    "the last attempt finished": {"attempts": attempts("killed", "done"), "job": OVER},
    "the last attempt finished; a later one was refused": {"attempts": attempts("done", "refused")},
    "the last attempt finished; another job is pending": {"attempts": attempts("done"), "job": PENDING},
    "the last attempt stopped on request": {"attempts": attempts("stopped"), "job": OVER},
    "the last attempt stopped on request; a later one was refused": {
        "attempts": attempts("stopped", "refused")
    },
    "the last attempt stopped on request; its job is pending": {
        "attempts": attempts("stopped", job_id="7"),
        "job": PENDING,
    },
    "the last attempt failed": {"attempts": attempts("stopped", "failed"), "job": OVER},
    "the last attempt failed; its job is pending": {"attempts": attempts("failed"), "job": PENDING},
    "the last attempt was killed, as the next start recorded": {"attempts": attempts("killed", "refused")},
    "the folder holds an adapter or metrics, but no attempts": {"attempts": []},
}


@pytest.mark.parametrize("situation", CASES)
def test_the_state_is_what_the_page_says(situation):
    case = {"trained": True} | CASES[situation]
    assert state_of(case.pop("attempts"), **case) == table()[situation]


def test_every_row_of_the_page_has_a_case():
    assert list(table()) == list(CASES)
