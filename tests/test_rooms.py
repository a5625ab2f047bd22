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
    "jobs": {"configs", "slurm"},
    "launch": {"configs", "data", "jobs", "slurm"},
    "slurm": set(),
    "trainer": {"configs", "data", "jobs"},
    "adapter": {"configs", "data", "jobs", "trainer"},
}
# inside the functions that need them: a command; a submitted job, which runs what is above jobs/
LATE = {"launch": {"adapter", "trainer"}, "jobs": {"launch", "trainer"}}


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for file in (ROOT / room).rglob("*.py"):
        tree = ast.parse(file.read_text())
        functions = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        late = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("qwenlora."):
                    allowed = ARROWS[room] | {room} | (LATE.get(room, set()) if node in late else set())
                    assert name.split(".")[1] in allowed, f"{file.name} imports {name}"


def test_the_light_rooms_import_no_torch():
    modules = ["qwenlora.trainer.main", "qwenlora.trainer.ranks.screen"]
    for room in ("configs", "data", "jobs", "launch", "slurm"):
        modules += [f"qwenlora.{room}.{module.name}" for module in pkgutil.iter_modules([str(ROOT / room)])]
    code = (
        "import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]; print('torch' in"
        " sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"
