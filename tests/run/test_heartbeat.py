"""Signs of life: written over in place by ranks, read by their agent."""

import os
import time
from pathlib import Path

from qwenlora.run import heartbeat


def test_the_last_beat_of_each_rank_is_read():
    with heartbeat.make_folder() as folder:
        hearts = [heartbeat.Heart(folder, rank) for rank in (10, 2)]
        assert heartbeat.read_beats(folder) == []  # opened, and nothing said yet
        for step in range(3):
            hearts[0].beat(step)
        hearts[0].beat()
        hearts[1].beat(7)
        second, tenth = heartbeat.read_beats(folder)
        assert (second.rank, second.step, second.beats, second.pid) == (2, 7, 1, os.getpid())
        assert (tenth.rank, tenth.step, tenth.beats) == (10, 2, 4)
        assert 0 <= time.monotonic() - second.at < 5
        assert {file.stat().st_size for file in Path(folder).iterdir()} == {160}
    assert not Path(folder).exists()


def test_without_an_agent_nothing_is_written():
    heartbeat.Heart("", 0).beat(3)
