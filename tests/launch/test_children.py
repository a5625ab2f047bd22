"""What an agent runs ends, or is given up."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from qwenlora.launch import children
from qwenlora.launch.children import Children

# an agent that lives as long as its input
AGENT = """
import sys, time
from qwenlora.launch.children import guarded
with guarded(1.5):
    print("guarded", flush=True)
    time.sleep(2)
    sys.stdin.read()
print("left", flush=True)
"""


class Deaf:
    def __init__(self, lives):
        self.lives, self.kills = lives, 0

    def poll(self):
        return None if self.kills < self.lives else -9

    def ranks(self):
        return []

    def kill(self):
        self.kills += 1


def run(running, monkeypatch):
    monkeypatch.setattr(children, "DYING_S", 0.2)
    monkeypatch.setattr(children, "POLL_S", 0.02)
    runner = Children()
    return runner.run(running, runner.kill), runner.immortal


def test_what_is_killed_ends(monkeypatch):
    assert run(Deaf(2), monkeypatch) == (-9, False)


def test_nobody_waits_for_ever_for_what_does_not_end_when_it_is_killed(monkeypatch):
    assert run(Deaf(1e9), monkeypatch) == (1, True)


@pytest.fixture
def agent():
    """An agent that has a guard."""
    argv = [sys.executable, "-c", AGENT]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout.readline() == "guarded\n"
        yield agent
        agent.kill()


def test_an_agent_that_is_stopped_is_killed_and_that_is_said(agent):
    agent.send_signal(signal.SIGSTOP)
    assert agent.wait(60) == -signal.SIGKILL
    assert "hung for 1.5 s (launch.stall_timeout_s): killed" in agent.stdout.read()


def test_an_agent_that_waits_lives_and_so_does_one_whose_job_is_suspended(agent):
    (guard,) = psutil.Process(agent.pid).children()
    stopped = (guard, psutil.Process(agent.pid))
    for process in stopped:
        process.suspend()
    time.sleep(2)  # longer than the limit
    for process in stopped:
        process.resume()
    time.sleep(2)
    assert agent.communicate(timeout=60) == ("left\n", None)
    assert agent.returncode == 0
    assert not guard.is_running()


def test_a_guard_ends_with_its_agent(agent):
    (guard,) = psutil.Process(agent.pid).children()
    agent.kill()
    guard.wait(60)
