"""What an agent runs ends, or is given up."""

from qwenlora.launch import children
from qwenlora.launch.children import Children


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
