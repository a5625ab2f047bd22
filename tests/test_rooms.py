"""The arrows between rooms run one way, and only trainer/ and adapter/ import torch."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "configs": set(),
    "data": {"configs", "jobs"},
    "jobs": {"configs"},
    "launch": {
        "configs",
        "data",
        "jobs",
        "adapter",
        "trainer",
    },  # these two: cli.py, inside the commands that need them
    "slurm": set(),
    "trainer": {"configs", "data", "jobs"},
    "adapter": {"configs", "data", "jobs", "trainer"},
}


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("qwenlora."):
                    assert name.split(".")[1] in ARROWS[room] | {room}, f"{file.name} imports {name}"


def test_the_light_rooms_import_no_torch():
    modules = ["qwenlora.trainer.main", "qwenlora.trainer.screen"]
    for room in ("configs", "data", "jobs", "launch", "slurm"):
        modules += [f"qwenlora.{room}.{module.name}" for module in pkgutil.iter_modules([str(ROOT / room)])]
    code = "import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
