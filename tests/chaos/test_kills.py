"""Killed with SIGKILL at any moment, a run goes on by the same command and ends as if nothing had happened,
to the bit.

`make chaos` does it 200 times (CHAOS_KILLS says how often), at least 60 of them between two file operations
of a save.
"""

import os
import random
from collections import Counter

import pytest
from lives import Life, write_config

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(0)]
KILLS = int(os.environ.get("CHAOS_KILLS", "4"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
STEPS = 10
# what a process does, by the function that it is in; nth: times that it is entered before the kill, at most
PLACES = {
    "preparing": ("prepare", "prepare", 1, 1.5),
    "starting": ("rank", "train", 1, 3.0),
    "in a step": ("rank", "training_step", 12, 0.1),
    "between steps": ("rank", "on_step_end", 6, 0.02),
    "evaluating": ("rank", "_sum_losses", 1, 0.15),
    "copying for a save": ("rank", "_save_checkpoint", 2, 0.01),
    "at the end": ("rank-0", "save_adapter", 1, 0.05),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    write_config(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(base):
    """The runs that nobody kills, on one process and on two; and how many file operations a save has."""
    lives = {}
    for processes in (1, 2):
        lives[processes] = Life(base / "my.yaml", f"whole-{processes}", processes)
        code, said = lives[processes].attempt()
        assert code == 0, said
    return lives


def operations_of_a_save(base) -> int:
    """Return how many file operations a save has, the removal of an old checkpoint with it."""
    life, report = Life(base / "my.yaml", "counted", 1), base / "operations.txt"
    code, said = life.attempt({"process": "rank-0", "count": str(report)})
    assert code == 0, said
    saves = Counter(line.split()[0] for line in report.read_text().splitlines())
    assert list(saves) == [f"save-{step}" for step in range(2, STEPS + 1, 2)]
    return saves["save-6"]


def moments(base, chance: random.Random, count: int) -> list[dict]:
    """Return when to kill: 30% of the kills, and each place at least, between the file operations of
    saves."""
    operations = operations_of_a_save(base)
    inside = max(round(count * 0.3), min(operations, round(count * 0.5)))
    print(f"a save has {operations} file operations, {inside} kills are between them")
    stride, start = max(operations / inside, 1.0), chance.randrange(operations)
    plans = [
        {"process": "rank-0", "operation": (start + round(number * stride)) % operations}
        for number in range(inside)
    ]
    for number in range(count - inside):
        name = list(PLACES)[number % len(PLACES)]
        process, function, most, seconds = PLACES[name]
        if process == "rank":
            process = f"rank-{chance.randrange(2)}"
        plans.append(
            {
                "process": process,
                "inside": function,
                "nth": chance.randint(1, most),
                "after_s": chance.random() * seconds,
            }
            | {"name": name}
        )
    for plan in plans:
        plan["everyone"] = chance.random() < 0.5
        plan.setdefault("name", "saving")
    chance.shuffle(plans)
    return plans


def sooner(plan: dict) -> dict:
    """Return a plan whose moment comes earlier: on a quick machine a place is left before it."""
    if "inside" not in plan:
        return plan
    return plan | {"nth": max(plan["nth"] // 2, 1), "after_s": plan["after_s"] / 2}


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(base, undisturbed):
    chance = random.Random(SEED)
    print(f"seed {SEED}, {KILLS} kills")
    todo, done, lives = moments(base, chance, KILLS), Counter(), 0
    while todo:
        lives += 1
        processes = 2 if lives % 2 else 1
        life = Life(base / "my.yaml", f"life-{lives}", processes)
        code = None
        while todo and code != 0:
            plan = todo.pop()
            # of one process, rank 0 is all there is
            code, said = life.attempt(plan | {"process": "rank-0"} if processes == 1 else plan)
            if code:
                assert code in (1, -9), said
                done[plan["name"]] += 1
                print(
                    f"{sum(done.values())}: {plan['name']}, {plan} -> {code}, newest"
                    f" checkpoint-{life.newest()}",
                    flush=True,
                )
            else:
                todo.insert(0, sooner(plan))  # it ended before that moment: in another life
        if code != 0:
            code, said = life.attempt()
        assert code == 0, said
        life.assert_equals(undisturbed[processes])
    print(f"{dict(done)} in {lives} lives, 0 failed")
    assert sum(done.values()) == KILLS
