"""The simulation of a job that loses nodes, beside the formula of `plan --scale`."""

import importlib.util
import random
from datetime import timedelta
from pathlib import Path

import pytest

from qwenlora.plan.scale import kept_share
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Attempt, now

FILE = Path(__file__).parents[2] / "benchmarks" / "goodput.py"


@pytest.fixture(scope="module")
def goodput():
    spec = importlib.util.spec_from_file_location("goodput", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("keep", "inside", "save_s", "restart_s"),
    [(20.0, 7.0, 20.0, 7.0), (None, 7.0, 600.0, 7.0), (20.0, None, 600.0, 120.0)],
)
def test_it_agrees_with_the_formula_where_nodes_are_plenty(goodput, keep, inside, save_s, restart_s):
    job = goodput.Job(1024, 3600.0, 600.0, keep, inside, 120.0)
    outcome = goodput.simulate(job, 20_000, random.Random(0))
    assert outcome.useful == pytest.approx(kept_share(save_s, restart_s, 1.0), abs=0.01)
    assert (outcome.at_work < 0.8) is (inside is not None), "those that failed come back with the queue"


def test_of_two_nodes_the_second_to_fail_takes_the_snapshots_along(goodput):
    job = goodput.Job(2, 3600.0, 600.0, 20.0, 7.0, 120.0)
    useful = goodput.simulate(job, 20_000, random.Random(0)).useful
    each = [kept_share(20.0, 7.0, 1.0), kept_share(600.0, 120.0, 1.0)]
    assert useful == pytest.approx(sum(each) / 2, abs=0.01)


def test_the_seconds_of_restarts_are_those_of_runs(goodput, tmp_path):
    assert goodput.measured([]) == (goodput.INSIDE_S, goodput.REQUEUED_S)
    run, start, lines = RunFolder(tmp_path), now(), []
    for number, (restarts, begins, ends) in enumerate([(0, 0, 100), (0, 101, 200), (1, 250, 300)], 1):
        attempt = Attempt(
            attempt=number,
            job_id="7",
            restarts=restarts,
            start=start + timedelta(seconds=begins),
            end=start + timedelta(seconds=ends),
            seconds={"model": 2.0, "first_step": 1.0},
        )
        lines.append(attempt.text(indent=None) + "\n")
    run.history.file.write_text("".join(lines))
    assert goodput.measured([tmp_path]) == pytest.approx((4.0, 53.0))
