"""The size of things: functions that one reads at a glance, names that mean one thing, types instead of
dicts.

`python tests/test_house.py` prints the figures.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "support"))  # also as a script
from house import classes, files, functions

LONGEST_FUNCTION = 60  # lines
MOST_COMPLEX = 15  # as radon counts
COMPLEX, COMPLEX_SHARE = 10, 0.04
MOST_PARAMETERS = 8
MOST_DICTS = 40
MOST_LINES = 39_200


@pytest.fixture(scope="module")
def measured():
    return list(functions())


def lines() -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files())


def untyped_dicts() -> Counter:
    return Counter({file: file.read_text(encoding="utf-8").count("dict[str, Any]") for file in files()})


def doubles() -> dict[str, list[str]]:
    """Return {class name: its modules} of names that two public classes have."""
    homes: dict[str, list[str]] = {}
    for name, module in classes():
        homes.setdefault(name, []).append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_no_function_is_longer_than_a_screen(measured):
    assert [function for function in measured if function.lines > LONGEST_FUNCTION] == []


def test_no_function_has_too_many_branches(measured):
    assert [function for function in measured if function.complexity > MOST_COMPLEX] == []
    assert sum(function.complexity > COMPLEX for function in measured) <= COMPLEX_SHARE * len(measured)


def test_no_function_has_too_many_parameters(measured):
    assert [one for one in measured if one.parameters > MOST_PARAMETERS and not one.command] == []


def test_dicts_of_anything_are_rare():
    assert untyped_dicts().total() <= MOST_DICTS


def test_no_two_public_classes_have_one_name():
    assert doubles() == {}


def test_the_package_does_not_grow():
    assert lines() <= MOST_LINES


if __name__ == "__main__":
    found = list(functions())
    over = [function for function in found if function.complexity > COMPLEX]
    print(f"product lines            {lines():,}")
    print(f"functions                {len(found):,}")
    print(f"longest function         {max((one.lines, one.name) for one in found)}")
    print(f"over {LONGEST_FUNCTION} lines            {sum(one.lines > LONGEST_FUNCTION for one in found)}")
    print(f"most complex             {max((one.complexity, one.name) for one in found)}")
    print(f"complexity over {MOST_COMPLEX}       {sum(one.complexity > MOST_COMPLEX for one in found)}")
    print(f"complexity over {COMPLEX}       {len(over)} = {len(over) / len(found):.1%}")
    crowded = [one for one in found if one.parameters > MOST_PARAMETERS and not one.command]
    print(
        f"over {MOST_PARAMETERS} parameters        {len(crowded)}: {', '.join(one.name for one in crowded)}"
    )
    print(f"dict[str, Any]           {untyped_dicts().total()}")
    print(f"one name, several classes {doubles()}")
