"""What was measured calibrates and corrects the next plans: within bounds, and never by one run alone."""

import json
import math

import pytest
from planned import case_of

from qwenlora.plan import measured
from qwenlora.plan.measured import Correction, Measured, Ran, Rates
from qwenlora.plan.plan import make_plan, way
from qwenlora.plan.speed import PUBLISHED, REACHED, step_time

H100 = {"device": "H100", "kind": "ddp"}
ODD_RATES = (({}, 1.0), ({"bfloat16": 0}, 1.0), ({"bfloat16": 1.0}, -1), ({"bfloat16": math.nan}, 1.0))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "qwenlora" / "measured.json"


def runs(*times, memory=None, **more):
    return Measured(runs=[Ran(**H100 | more, time=time, memory=memory) for time in times])


def test_one_odd_run_corrects_nothing_and_of_several_the_median_does():
    assert runs(1.9).correction("H100", "ddp") == runs(1.9, 1.9).correction("H100", "ddp") == Correction()
    assert runs(1.1, 9.0, 1.2).correction("H100", "ddp") == Correction(1.0, 1.2, 3)
    assert runs(1.1, 1.1, 1.1).correction("H100", "zero3") == Correction()
    assert runs(1.1, 1.1, 1.1).correction("A100-80", "ddp") == Correction()


def test_a_correction_is_bounded():
    assert runs(5.0, 5.0, 5.0, memory=3.0).correction("H100", "ddp") == Correction(1.25, 2.0, 3)
    assert runs(0.1, 0.1, 0.1, memory=0.1).correction("H100", "ddp") == Correction(0.8, 0.5, 3)


def test_the_last_runs_are_kept_and_those_of_others_with_them():
    kept = runs(1.0, kind="zero3").with_run(Ran(**H100, time=2.0))
    for _ in range(9):
        kept = kept.with_run(Ran(**H100, time=1.5))
    assert [run.time for run in kept.runs] == [1.0, *[1.5] * 9]


def test_a_plan_is_corrected_by_runs_of_its_gpu_and_strategy():
    plain = case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=2)
    by = plain._replace(measured=runs(1.5, 1.5, 1.5, memory=1.1))
    before, after = way(plain, "ddp", "global"), way(by, "ddp", "global")
    assert after.step_s == pytest.approx(1.5 * before.step_s)
    assert after.tokens_s == pytest.approx(before.tokens_s / 1.5)
    tensors = before.memory.total - before.memory.reserve
    assert after.memory.total == pytest.approx(before.memory.total + 0.1 * tensors, rel=1e-6)
    assert way(by, "fsdp", "global") == way(plain, "fsdp", "global")


def test_what_was_measured_of_a_gpu_takes_the_place_of_its_data_sheet():
    plain = case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8)
    rates = Rates(products={"bfloat16": 700e12, "float32": 50e12}, memory=3e12, link=300e9)
    case = plain._replace(measured=Measured(devices={"H100": rates}))
    before, after = (step_time(one, "ddp", "global", 0) for one in (plain, case))
    assert after.products == pytest.approx(before.products * REACHED * 989 / 700)
    assert after.traffic == pytest.approx(before.traffic * 3.35 / (3 / 0.9))
    assert after.reducing == pytest.approx(before.reducing * 0.8 * 450 / 300)
    single = case._replace(
        config=case.config.model_copy(
            update={"model": case.config.model.model_copy(update={"dtype": "float32"})}
        )
    )
    assert step_time(single, "ddp", "global", 0).products == pytest.approx(after.products * 700 / 50)
    assert PUBLISHED < 1


def test_a_cpu_is_planned_for_by_what_was_measured_of_it():
    rates = Rates(products={"float32": 2e11}, memory=2e10)
    plain = case_of("Qwen/Qwen2.5-0.5B", "h100")
    cpu = measured.device_of("A CPU, 2 cores", 64_000, rates)
    case = plain._replace(
        gpu=cpu,
        machine=plain.machine._replace(gpus=0, gpu_bytes=cpu.bytes),
        measured=Measured(devices={cpu.name: rates}),
    )
    plan = make_plan(case)
    assert not case.is_packed
    assert plan.recommended.memory.reserve == 0
    assert plan.recommended.step_s > step_time(plain, "ddp", "global", 0).seconds


def test_a_damaged_file_is_one_warning_and_the_next_run_writes_it_anew(file, capsys):
    assert measured.read() == Measured()
    file.parent.mkdir()
    odd = [{"products": products, "memory": memory} for products, memory in ODD_RATES]
    odd_devices = [json.dumps({"devices": {"H100": rates}}) for rates in odd]
    odd_runs = [json.dumps({"runs": [H100 | {"time": time}]}) for time in (-1, math.nan)]
    for text in ("{", '{"runs": 3}', '{"format": 99}', *odd_devices, *odd_runs):
        file.write_text(text)
        assert measured.read() == Measured()
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {file} cannot be read: ")
        assert said.count("\n") == 1
    measured.change(lambda there: there.with_run(Ran(**H100, time=1.0)))
    assert measured.read().runs == [Ran(**H100, time=1.0)]


def test_the_file_may_be_deleted(file):
    measured.change(lambda there: there.with_device("H100", Rates(products={"float32": 1.0}, memory=1.0)))
    assert measured.read().devices
    file.unlink()
    assert measured.read() == Measured()


def test_a_plan_says_what_is_calibrated_and_what_is_corrected(file, qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name_or_path: Qwen/Qwen2.5-7B}\ndata: {train: example}\n")
    command = ("plan", str(tmp_path / "my.yaml"), "--gpu", "h100")
    before = qwenlora(*command).stdout
    assert "calibrated:" not in before
    assert "corrected" not in before
    rates = Rates(products={"bfloat16": 700e12}, memory=3e12)
    measured.change(lambda _: runs(1.5, 1.5, 1.5).with_device("H100", rates))
    after = qwenlora(*command).stdout
    assert "; calibrated: bfloat16 700 TFLOP/s, memory 3,000 GB/s\n" in after
    assert "corrected     ddp by 3 runs on H100: memory x 1.00, time x 1.50\n" in after
