"""What an agent runs ends, or is given up."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from threading import Thread

import psutil
import pytest

from qwenlora.launch import children
from qwenlora.launch.children import Children, guarded

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
def agent_of():
    """Start an agent that has a guard. options: of its process."""
    with ExitStack() as agents:

        def start(**options):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            agent = agents.enter_context(subprocess.Popen([sys.executable, "-c", AGENT], **pipes, **options))
            agents.callback(agent.kill)
            assert agent.stdout.readline() == "guarded\n"
            return agent

        yield start


@pytest.fixture
def agent(agent_of):
    """An agent that has a guard."""
    return agent_of()


def test_an_agent_that_is_stopped_is_killed_and_that_is_said(agent):
    agent.send_signal(signal.SIGSTOP)
    assert agent.wait(60) == -signal.SIGKILL
    assert "hung for 1.5 s (launch.stall_timeout_s): killed" in agent.stdout.read()


def test_an_agent_whose_output_takes_no_more_is_killed_without_a_word():
    """The disk that it waits for has the job's output, too."""
    ready, full = os.pipe(), os.pipe()
    os.set_blocking(full[1], False)
    with suppress(BlockingIOError):
        while os.write(full[1], bytes(4096)):
            pass
    os.set_blocking(full[1], True)
    code = AGENT.replace('print("guarded", flush=True)', f"import os; os.write({ready[1]}, b'.')")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=full[1], pass_fds=[ready[1]]
    ) as agent:
        assert os.read(ready[0], 1) == b"."
        agent.send_signal(signal.SIGSTOP)
        try:
            assert agent.wait(60) == -signal.SIGKILL
        finally:
            agent.kill()
    for end in (*ready, *full):
        os.close(end)


def test_a_signal_that_a_parent_blocked_shows_life_all_the_same(agent_of):
    agent = agent_of(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}))
    time.sleep(3)  # twice the limit
    assert agent.communicate(timeout=60) == ("left\n", None)


def test_on_another_thread_nothing_is_guarded():
    codes = []

    def run():
        with guarded(1.0):
            codes.append(psutil.Process().children())

    thread = Thread(target=run)
    before = psutil.Process().children()
    thread.start()
    thread.join()
    assert codes == [before]


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
