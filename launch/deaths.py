"""Which rank a signal ended, with DeepSpeed's launcher, which does not say it. torchrun does.

That launcher asks after its ranks once a second, and from then on nobody can know how one ended. Who pauses
here wakes up the moment that a rank ends, and is there first.
"""

import os
import select
import signal
from pathlib import Path
from typing import IO

from qwenlora.launch.verdict import killed_line
from qwenlora.run import heartbeat


class Deaths:
    """Of the ranks of one node. beats: the folder of their signs of life; log: takes down the first one
    killed."""

    def __init__(self, beats: str, log: IO[bytes], processes: int) -> None:
        self._beats, self._log, self._processes = beats, log, processes
        self._found = False
        self._ends: dict[int, int] = {}  # by process: a descriptor that can be read once it has ended
        self._poll = select.poll()

    def __enter__(self) -> "Deaths":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._ends.values():
            if descriptor >= 0:
                os.close(descriptor)

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until a rank ends."""
        for beat in heartbeat.read(self._beats):
            if beat.pid not in self._ends:
                try:
                    self._ends[beat.pid] = os.pidfd_open(beat.pid)
                except OSError:  # it is gone, or this kernel has no such thing
                    self._ends[beat.pid] = -1
                else:
                    self._poll.register(self._ends[beat.pid], select.POLLIN)
        for descriptor, _ in self._poll.poll(seconds * 1000):
            self._poll.unregister(descriptor)

    def look(self) -> bool:
        """Note the first rank that a signal ended; return whether that is news."""
        for beat in heartbeat.read(self._beats):
            if number := _ended_by(beat.pid):
                return self._note(beat.rank, number)
        return False

    def told(self, code: int) -> None:
        """Note what the launcher's exit code tells, should a node's only rank have ended unseen: 247 is
        -9."""
        beats = heartbeat.read(self._beats)
        if self._processes == len(beats) == 1 and 256 - code in signal.valid_signals():
            self._note(beats[0].rank, 256 - code)

    def _note(self, rank: int, number: int) -> bool:
        if self._found:
            return False
        self._found = True
        self._log.write(killed_line(rank, number).encode())
        self._log.flush()
        return True


def _ended_by(pid: int) -> int:
    """Return the signal that ended a process whose parent has not asked yet; 0 where there is none.

    Source: proc_pid_stat(5), exit_code, as wait(2) has it: the last field.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return 0
    return int(fields[-1]) & 0x7F if fields[0] == "Z" else 0
