"""The arrows between rooms run one way, none is hidden in a function, and only trainer/ and adapter/ import
torch."""

import pkgutil
import subprocess
import sys

import pytest
from house import ROOMS, ROOT, circles, imports

# what a room may import; all of them also stand on themselves
ARROWS = {
    "slurm": set(),
    "configs": set(),
    "run": {"configs", "slurm"},
    "data": {"configs", "run"},
    "plan": {"configs", "data", "run"},
    "launch": {"configs", "data", "plan", "run", "slurm"},
    "trainer": {"configs", "data", "plan", "run"},
    "jobs": {"configs", "data", "launch", "plan", "run", "slurm", "trainer"},
    "adapter": {"configs", "data", "jobs", "plan", "run", "trainer"},
    "cli": {"adapter", "configs", "data", "jobs", "launch", "plan", "run", "slurm", "trainer"},
}
TWO_DEEP = ("adapter", "jobs", "trainer")


def sub_room(module: str) -> str:
    """Return trainer.loop of trainer.loop.saver; a file beside sub-rooms is one by itself."""
    room, *rest = module.split(".")
    return f"{room}.{rest[0]}" if room in TWO_DEEP and rest else room


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    targets = {(arrow.source, arrow.target) for arrow in imports() if arrow.source.split(".")[0] == room}
    assert {
        pair for pair in targets if pair[1].split(".")[0] not in ARROWS[room] | {room} and pair[1] != room
    } == set()


def test_no_arrow_between_rooms_is_hidden_in_a_function():
    hidden = [arrow for arrow in imports() if arrow.late]
    assert [one for one in hidden if one.source.split(".")[0] != one.target.split(".")[0]] == []


def test_no_module_and_no_part_of_a_room_leads_back_to_itself():
    arrows = list(imports())
    assert circles((arrow.source, arrow.target) for arrow in arrows) == []
    assert circles((sub_room(arrow.source), sub_room(arrow.target)) for arrow in arrows) == []


def test_circles_are_seen():
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]


def test_the_light_rooms_import_no_torch():
    modules = ["qwenlora.trainer.main"]
    for room in ("cli", "configs", "data", "jobs", "launch", "plan", "run", "slurm"):
        paths = pkgutil.walk_packages([str(ROOT / room)], f"qwenlora.{room}.")
        modules += [module.name for module in paths]
    code = (
        "import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]; print('torch' in"
        " sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


def test_what_prepares_rows_imports_no_datasets():
    """It brings pandas, which takes seconds, and only data sets of the hub need it."""
    code = "import sys, qwenlora.trainer.data_check; print('datasets' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
