"""What cannot fit is refused before it is queued, with changes that then pass."""

import json
import re

import pytest
import yaml

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import Config
from qwenlora.plan import fit
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.hardware import named, of_this_machine


def config_of(base, **sections):
    values = {"run_dir": "r", "model": {"name_or_path": base}, "data": {"train": "example"}}
    return Config.model_validate(values | sections)


def changed(config, cure):
    """Return the config with the settings of a cure, as `key: value with key: value`."""
    values = config.model_dump(by_alias=True)
    for setting in cure.split(" with "):
        key, value = setting.split(": ")
        section, name = key.split(".")
        values[section][name] = yaml.safe_load(value)
    return Config.model_validate(values)


CASES = [
    ("Qwen/Qwen2.5-72B", "4090", 8, {"strategy": {"name": "ddp"}}),
    ("Qwen/Qwen2.5-14B", "4090", 1, {}),
    ("Qwen/Qwen2.5-14B", "4090", 2, {"strategy": {"name": "zero2"}}),
    ("Qwen/Qwen3-30B-A3B", "4090", 1, {"strategy": {"quantization": "nf4"}}),
    ("Qwen/Qwen3-14B", "v100-16", 4, {"strategy": {"name": "ddp"}}),
]


@pytest.mark.parametrize(("base", "gpu", "gpus", "sections"), CASES)
def test_what_cannot_fit_is_refused_with_changes_that_pass(base, gpu, gpus, sections):
    config, machine, kind = config_of(base, **sections), Machine(1, gpus, gpus), named(gpu)
    with pytest.raises(ValueError, match=r"needs at least .* GB") as refusal:
        fit.check(config, machine, kind)
    (cures,) = re.findall("what would fit: (.*); launch.plan", str(refusal.value))
    settings = [cure for cure in cures.split(" or ") if "such GPUs" not in cure]
    assert settings
    for cure in settings:
        assert fit.check(changed(config, cure), machine, kind) == ""


@pytest.mark.parametrize("launch", ["warn", "off"])
def test_it_may_be_a_warning_or_nothing(launch):
    config = config_of("Qwen/Qwen2.5-72B", launch={"plan": launch})
    said = fit.check(config, Machine(1, 1, 1), named("4090"))
    assert ("needs at least" in said) == (launch == "warn")


def test_more_gpus_are_named_with_a_batch_for_all_of_them():
    config = config_of("Qwen/Qwen2.5-72B", strategy={"name": "fsdp"}, train={"global_batch_size": 12})
    setting = fit.Setting(config, Machine(1, 4, 4, named("4090").bytes))
    cures = list(fit.cures_of(setting, shape_of_base(config.model)[0]))
    assert "32 such GPUs and train.global_batch_size: 32" in cures


@pytest.mark.parametrize(
    ("base", "gpu", "gpus", "sections"),
    [
        (
            "Qwen/Qwen2.5-72B",
            "4090",
            8,
            {"strategy": {"name": "zero3"}, "data": {"train": "example", "max_length": 512}},
        ),
        ("Qwen/Qwen3-235B-A22B", "h100", 8, {"strategy": {"name": "fsdp"}, "train": {"optim": "adafactor"}}),
        ("Qwen/Qwen2.5-7B", "4090", 1, {"strategy": {"shard_group": "node"}}),
        ("Qwen/Qwen2.5-7B", "4090", 1, {"lora": {"target_modules": "[bad"}}),
        ("Qwen/Qwen2.5-7B", "h100", 1, {}),
        ("Qwen/Qwen2.5-72B", "h100", 8, {}),
        ("Qwen/Qwen2.5-7B", "t4", 1, {"strategy": {"quantization": "nf4"}}),
        ("someone/unknown-9B", "t4", 1, {}),
        ("tiny", "t4", 1, {}),
    ],
)
def test_what_may_fit_and_what_is_unknown_is_not_refused(base, gpu, gpus, sections):
    assert fit.check(config_of(base, **sections), Machine(1, gpus, gpus), named(gpu)) == ""


def test_a_gpu_has_the_memory_that_its_driver_says(monkeypatch, tmp_path):
    """As an RTX 4090 with twice its chips; of several kinds a run may have the largest alone."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for lines, found in (
        ("NVIDIA GeForce RTX 4090, 49140", ("GeForce RTX 4090", 49140)),
        ("Tesla T4, 15360\nNVIDIA A100-SXM4-80GB, 81920", ("A100-80", 81920)),
        ("NVIDIA H100 80GB HBM3, [N/A]", ("H100", 81559)),
        ("NVIDIA H100 80GB HBM3, 81559\nNVIDIA Thing, 1", None),
    ):
        smi.write_text(f"#!/bin/sh\necho '{lines}'\n")
        smi.chmod(0o755)
        gpu = of_this_machine()
        assert (gpu and (gpu.name, gpu.memory_mib)) == found


def test_rows_of_unknown_length_are_not_held_against_a_run():
    """Without packing a row may be short, however large max_length is."""
    long = {"data": {"train": "example", "max_length": 131072, "packing": "off"}}
    assert fit.check(config_of("Qwen/Qwen2.5-7B", **long), Machine(1, 1, 1), named("4090")) == ""


def test_a_pack_holds_no_more_than_all_rows(tmp_path):
    """However large max_length is, few short rows do not fill it."""
    row = json.dumps({"instruction": "What is it?", "output": "A row of a file. " * 20}) + "\n"
    for rows, refused in ((100, False), (20_000, True)):
        (tmp_path / "rows.jsonl").write_text(row * rows)
        data = {"train": str(tmp_path / "rows.jsonl"), "max_length": 131072, "packing": "on"}
        config = config_of("Qwen/Qwen2.5-7B", data=data, launch={"plan": "warn"})
        assert bool(fit.check(config, Machine(1, 1, 1), named("4090"))) == refused


@pytest.mark.parametrize(("gpus", "whom"), [(1, "the GPU"), (2, "each of 2 GPUs")])
def test_a_refusal_says_what_is_needed_and_what_is_there(gpus, whom):
    config = config_of("Qwen/Qwen2.5-14B", strategy={"name": "ddp"}, launch={"plan": "warn"})
    said = fit.check(config, Machine(1, gpus, gpus), named("4090"))
    assert said.startswith(
        "strategy.name=ddp: model.name_or_path=Qwen/Qwen2.5-14B needs at least 32.7 GB of"
        f" {whom}, and a GeForce RTX 4090 has 25.8 GB (29.5 GB base, 1.1 GB adapter, 1.6 GB for 2,048"
        " tokens); what would fit: "
    )
