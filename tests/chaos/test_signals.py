"""Asked to stop at any moment, by a signal to any one rank, a run saves, leaves with 75, and repeats nothing.

`make chaos` does it 50 times (CHAOS_SIGNALS says how often).
"""

import os
import random
import signal
import time

import psutil
import pytest
from lives import Life, write_config

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(0)]
SIGNALS = int(os.environ.get("CHAOS_SIGNALS", "2"))
SEED = int(os.environ.get("CHAOS_SEED", "2"))
STEPS = max(SIGNALS * 8, 40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Life:
    """The run that nobody disturbs."""
    life = Life(write_config(tmp_path_factory.mktemp("whole"), STEPS), "whole", 2)
    code, said = life.attempt()
    assert code == 0, said
    return life


def wait_for_training(life, process, number) -> int:
    """Wait until an attempt, after the number that there were, has trained a step; return which."""
    for _ in range(9000):
        attempts = life.run.history.attempts()
        if len(attempts) > number and (progress := life.run.history.progress.read(number + 1)):
            return progress.step
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("no progress")


def ranks(process) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    found = {one.name(): one for one in children}
    return [found["rank-0"], found["rank-1"]]


@pytest.mark.long
def test_one_signalled_rank_of_two_is_enough_at_any_moment(tmp_path, whole):
    chance = random.Random(SEED)
    print(f"seed {SEED}, {SIGNALS} signals")
    life = Life(write_config(tmp_path, STEPS), "cut", 2)
    longest, last = 0.0, 0
    for number in range(SIGNALS):
        with life.start() as process:
            wait_for_training(life, process, number)
            time.sleep(chance.random() * 1.2)  # in a step, a save, an evaluation, or between them
            victim, kind = chance.choice(ranks(process)), chance.choice([signal.SIGTERM, signal.SIGUSR1])
            victim.send_signal(kind)
            start = time.monotonic()
            said = process.communicate(timeout=500)[0]
        took = time.monotonic() - start
        longest = max(longest, took)
        attempt = life.run.history.attempts()[-1]
        print(f"{number + 1}: {kind.name} after step {attempt.last_step}, left in {took:.2f} s", flush=True)
        assert process.returncode == 75, said
        assert life.newest() == attempt.last_step, "what was trained is saved"
        assert (attempt.first_step, attempt.steps_repeated) == (last + 1, 0)
        last = attempt.last_step
    code, said = life.attempt()
    assert code == 0, said
    life.assert_equals(whole)
    print(f"{SIGNALS} of {SIGNALS} left with 75, the slowest in {longest:.2f} s; 0 steps repeated")


def test_two_signals_a_second_apart_on_two_ranks_do_not_hang(tmp_path, whole):
    """Each rank stopping by its own clock is what hangs transformers' own."""
    life = Life(write_config(tmp_path, STEPS), "cut", 2)
    with life.start() as process:
        wait_for_training(life, process, 0)
        first, second = ranks(process)
        second.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        if first.is_running():
            first.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=500)[0]
    assert process.returncode == 75, said
    assert life.attempt()[0] == 0
    life.assert_equals(whole)
