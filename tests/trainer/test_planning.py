"""A run keeps what was planned of it, and its end teaches the next plan."""

import json

import pytest
from run_facts import make_facts

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import Config
from qwenlora.plan import measured
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.measured import Ran, Rates
from qwenlora.run.folder import RunFolder
from qwenlora.run.hardware import cpu_name
from qwenlora.run.records import Attempt, Planned, now
from qwenlora.trainer.record import planning
from qwenlora.trainer.spread.strategy import Spread

PLAN = Planned(device="H100", kind="ddp", step_s=2.0, tokens_s=1200.0, memory=20 * 10**9)


def lines(*speeds, every=10):
    return [
        {"step": every * number, "loss": 1.0, "tokens_per_s": speed, "peak_memory_gb": 21.0 + number / 10}
        for number, speed in enumerate(speeds, 1)
    ]


def attempt(plan=PLAN, first=1):
    return Attempt(attempt=1, start=now(), first_step=first, planned=plan)


def test_a_run_teaches_its_median_speed_and_its_peak_without_the_first_line():
    ran = planning.of_attempt(attempt(), lines(10.0, 900.0, 1000.0, 1100.0))
    assert (ran.device, ran.kind, ran.time) == ("H100", "ddp", 1.2)
    assert ran.memory == pytest.approx(21.4 / 20)


def test_what_a_corrected_plan_missed_is_counted_from_the_formula():
    plan = PLAN.model_copy(update={"tokens_s": 1000.0, "time_by": 1.2, "memory_by": 1.1})
    ran = planning.of_attempt(attempt(plan), lines(10.0, 1000.0, 1000.0, 1000.0))
    assert ran.time == pytest.approx(1.2)
    assert ran.memory == pytest.approx(1.1 * 21.4 / 20)


def test_a_run_that_is_too_short_or_was_not_planned_teaches_nothing():
    assert planning.of_attempt(attempt(), lines(10.0, 1000.0, 1000.0)) is None
    assert planning.of_attempt(attempt(), lines(*[1000.0] * 5, every=2)) is None
    assert planning.of_attempt(attempt(None), lines(*[1000.0] * 5)) is None
    assert planning.of_attempt(attempt(), []) is None


@pytest.mark.parametrize("writable", [True, False])
def test_the_end_of_a_run_writes_the_file_or_lets_it_be(tmp_path, monkeypatch, caplog, writable):
    home = tmp_path / "home"
    home.mkdir() if writable else home.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.history.begin(1)
    run.note_attempt(first_step=1, planned=PLAN)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines(*[1000.0] * 5)))
    planning.learn(run)
    assert [ran.time for ran in measured.read().runs] == [1.2] * writable
    assert ("cannot be written" in caplog.text) != writable


def test_a_cpu_is_planned_for_once_it_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = Config.model_validate(
        {"run_dir": "r", "model": {"name_or_path": "tiny"}, "data": {"train": "example"}}
    )
    facts = make_facts(parameters=count(shape_of_base(config.model)[0], config.lora))
    spread = Spread(machine=Machine(1, 1, 0), micro_batch=4)
    assert planning.planned(config, facts, spread) is None
    rates = Rates(products={"float32": 1e11}, memory=1e10)
    measured.change(lambda file: file.with_device(cpu_name(), rates))
    plan = planning.planned(config, facts, spread)
    assert (plan.device, plan.kind, plan.memory) == (cpu_name(), "ddp", None)
    assert plan.step_s > 0
    measured.change(lambda file: file.revised(runs=[Ran(device=cpu_name(), kind="ddp", time=1.5)] * 3))
    assert planning.planned(config, facts, spread).step_s == pytest.approx(1.5 * plan.step_s)
