"""Whether a job that failed is worth another attempt."""

import pytest

from qwenlora.launch import restarts
from qwenlora.run.records import Attempt, now


def attempt(reason, saved_before, job="7", **values):
    return Attempt(
        attempt=1, start=now(), end=now(), reason=reason, saved_before=saved_before, job_id=job, **values
    )


@pytest.mark.parametrize(
    ("attempts", "newest", "again"),
    [
        ([("failed", 0)], 0, True),  # once may be chance
        ([("failed", 0), ("failed", 0)], 0, False),
        ([("failed", 0), ("failed", 8)], 16, True),
        ([("failed", 0), ("failed", 8)], 8, True),  # the first saved 8 steps, the second none
        ([("failed", 0), ("failed", 8), ("failed", 8)], 8, False),
        ([("failed", 8), ("stopped", 8), ("failed", 8)], 8, False),  # a preemption in between changes nothing
        ([("failed", 8), ("stopped", 8), ("failed", 12)], 12, True),  # but the stop saved steps
        ([("killed", 0), ("killed", 0), ("failed", 0)], 0, True),  # Slurm killed the others
        ([("failed", 0), ("failed", 4), ("failed", 8)], 12, True),
        ([("failed", 0), ("failed", 4), ("failed", 8), ("failed", 12)], 16, False),  # more than max_restarts
    ],
)
def test_a_failure_is_tried_again_while_steps_are_saved(attempts, newest, again):
    attempts = [attempt(*values) for values in attempts]
    assert restarts.worth_another(attempts, "7", 3, newest)[0] is again


def test_attempts_of_an_earlier_job_do_not_count():
    attempts = [attempt("failed", 0, "6"), attempt("failed", 0, "6"), attempt("failed", 0)]
    assert restarts.worth_another(attempts, "7", 3, 0) == (
        True,
        "trying again: attempt 4 starts from the first step",
    )
    attempts += [attempt("failed", 0)]
    again, why = restarts.worth_another(attempts, "7", 3, 0)
    assert (again, why) == (
        False,
        "not tried again: 2 attempts failed in a row and saved no step (a crash loop)",
    )


def test_a_node_that_was_lost_is_no_crash():
    attempts = [attempt("failed", 0, cause="NODE_FAIL") for _ in range(4)]
    assert restarts.worth_another(attempts, "7", 3, 0)[0]
    assert restarts.worth_another([*attempts, attempt("failed", 0)], "7", 3, 0)[0]
    assert not restarts.worth_another([*attempts, attempt("failed", 0), attempt("failed", 0)], "7", 3, 0)[0]


def test_attempts_that_lose_a_node_are_no_crashes_but_end_when_ten_have_saved_nothing():
    attempts = [attempt("failed", 0, lost=["node2"]) for _ in range(9)]
    assert restarts.worth_another(attempts, "7", 3, 0)[0]
    again, why = restarts.worth_another([*attempts, attempt("failed", 0, lost=["node2"])], "7", 3, 0)
    assert (again, why) == (False, "not tried again: 10 attempts in a row have saved no step")


def test_attempts_that_find_a_bad_node_are_no_crashes_but_not_for_ever():
    """Where other nodes hang next, nodes are not the reason."""
    attempts = [attempt("failed", 0), attempt("failed", 0, bad=["node2"])]
    assert restarts.worth_another(attempts, "7", 3, 0)[0]
    assert not restarts.worth_another([*attempts, attempt("failed", 0)], "7", 3, 0)[0]
    three = [attempt("failed", 0, bad=[f"node{number}"]) for number in range(3)]
    assert restarts.worth_another(three[:2], "7", 3, 0)[0]
    assert not restarts.worth_another(three, "7", 3, 0)[0]


def test_no_restarts_are_wanted():
    again, why = restarts.worth_another([attempt("failed", 0)], "7", 0, 20)
    assert (again, why) == (False, "not tried again: 1 attempt failed, launch.max_restarts is 0")


@pytest.mark.parametrize(
    ("attempts", "newest", "count"),
    [
        ([("stopped", 0)], 8, 0),
        ([("stopped", 0)], 0, 1),
        ([("stopped", 0), ("stopped", 0), ("stopped", 0)], 0, 3),
        ([("stopped", 0), ("stopped", 8), ("failed", 8), ("stopped", 8)], 8, 3),
        ([("stopped", 0), ("stopped", 8), ("stopped", 8)], 9, 0),
    ],
)
def test_attempts_in_vain_are_those_since_a_step_was_saved(attempts, newest, count):
    earlier = [attempt("stopped", 0, "6")]  # another job's
    assert restarts.in_vain([*earlier, *(attempt(*values) for values in attempts)], "7", newest) == count
