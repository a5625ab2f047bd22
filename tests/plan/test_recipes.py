"""Each config that comes along loads, and what is planned of it in its comment is what a plan says."""

import re
from pathlib import Path

import pytest

from qwenlora.configs.combinations import Machine
from qwenlora.configs.load import load_config
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import named
from qwenlora.plan.plan import way
from qwenlora.plan.rows import guess
from qwenlora.plan.speed import Case, Links

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PLANNED = re.compile(r"# Planned on (\d+) x (\S+): ([\d.]+) GB, ([\d,]+) tokens/s")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_loads_and_says_how_it_is_run(file):
    config = load_config(file, {"data.train": "example"})
    shape, _ = shape_of_base(config.model)
    assert count(shape, config.lora).trainable > 0
    assert re.search("# .*(qwenlora train|make train|slurm/train.sh)", file.read_text())


@pytest.mark.parametrize(
    "file", [file for file in RECIPES if "Planned on" in file.read_text()], ids=lambda f: f.stem
)
def test_what_a_recipe_says_of_its_plan_is_true(file):
    gpus, name, memory, speed = PLANNED.search(file.read_text()).groups()
    config, gpu = load_config(file, {"data.train": "example"}), named(name)
    shape, _ = shape_of_base(config.model)
    machine = Machine(1, int(gpus), int(gpus), gpu.bytes, gpu.nvlink > 0)
    case = Case(config, count(shape, config.lora), guess(config.data), machine, gpu, Links(gpu.link, 50e9))
    found = way(case, config.strategy.name.replace("auto", "ddp"), "global")
    assert found.fit == "fits"
    assert found.memory.total / 1e9 == pytest.approx(float(memory), abs=0.1)
    assert found.tokens_s == pytest.approx(float(speed.replace(",", "")), rel=0.01)
