"""What cannot fit is refused before it is queued, with changes that then pass."""

import re

import pytest
import yaml

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import Config
from qwenlora.plan import fit
from qwenlora.plan.hardware import named


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
    ("Qwen/Qwen3-8B", "v100-16", 4, {"strategy": {"name": "ddp"}}),
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


@pytest.mark.parametrize(
    ("base", "gpu", "gpus", "sections"),
    [
        ("Qwen/Qwen2.5-7B", "h100", 1, {}),
        ("Qwen/Qwen2.5-72B", "h100", 8, {}),
        ("Qwen/Qwen2.5-7B", "t4", 1, {"strategy": {"quantization": "nf4"}}),
        ("someone/unknown-9B", "t4", 1, {}),
        ("tiny", "t4", 1, {}),
    ],
)
def test_what_may_fit_and_what_is_unknown_is_not_refused(base, gpu, gpus, sections):
    assert fit.check(config_of(base, **sections), Machine(1, gpus, gpus), named(gpu)) == ""


def test_rows_of_unknown_length_are_not_held_against_a_run():
    """Without packing a row may be short, however large max_length is."""
    long = {"data": {"train": "example", "max_length": 131072, "packing": "off"}}
    assert fit.check(config_of("Qwen/Qwen2.5-7B", **long), Machine(1, 1, 1), named("h100")) == ""
