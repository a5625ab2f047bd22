"""Each config that comes along loads, and what is planned of it in its comment is what a plan says."""

import re
from pathlib import Path

import pytest

from qwenlora.configs.combinations import Machine
from qwenlora.configs.load import load_config
from qwenlora.configs.recipes import ITEMS, as_markdown, recipes
from qwenlora.launch.dry_run import dry_run
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import named
from qwenlora.plan.plan import way
from qwenlora.plan.rows import guess
from qwenlora.plan.speed import Case, Links

RECIPES = {recipe.name: recipe for recipe in recipes()}
PLANNED = re.compile(r"([\d.]+) GB, ([\d,]+) tokens/s on (?:(\d+) x )?(\d+) (\S+), planned")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_says_what_it_is(name, tmp_path):
    recipe = RECIPES[name]
    config = load_config(recipe.file, {"data.train": "example", "run_dir": str(tmp_path)})
    assert "\n# command " in dry_run(config, [str(recipe.file)], fresh=False, resume="auto", allowed=[])
    shape, _ = shape_of_base(config.model)
    assert count(shape, config.lora).trainable > 0
    assert list(recipe.items) == list(ITEMS)
    assert all((recipe.title, recipe.about, *recipe.items.values()))
    assert re.fullmatch(
        rf"(qwenlora train|sbatch .* slurm/train.sh) configs/{name}\.yaml( data.train=\S+)?", recipe.command
    )
    assert recipe.items["Takes"].endswith(("planned", "measured"))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_what_a_recipe_says_of_its_plan_is_true(name):
    recipe = RECIPES[name]
    memory, speed, nodes, gpus, kind = PLANNED.fullmatch(recipe.items["Takes"]).groups()
    config, gpu = load_config(recipe.file, {"data.train": "example"}), named(kind)
    shape, _ = shape_of_base(config.model)
    machine = Machine(int(nodes or 1), int(gpus), int(gpus), gpu.bytes, gpu.nvlink > 0)
    few = guess(config.data)  # so many that packs are full
    rows = few._replace(rows=1000 * few.rows, tokens=1000 * few.tokens, trained=1000 * few.trained)
    case = Case(config, count(shape, config.lora), rows, machine, gpu, Links(gpu.link, 50e9))
    found = way(case, config.strategy.name.replace("auto", "ddp"), config.strategy.shard_group)
    assert found.fit == "fits"
    assert found.memory.total / 1e9 == pytest.approx(float(memory), abs=0.1)
    assert found.tokens_s == pytest.approx(float(speed.replace(",", "")), rel=0.01)


def test_the_gallery_is_as_it_would_be_made_now():
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), "run `make schema`"
