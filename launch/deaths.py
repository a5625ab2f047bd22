"""Which rank a signal killed, under DeepSpeed's launcher, which does not say so: the agent looks itself.
That launcher reaps its ranks once a second, and then nobody can see any more how a rank ended. Deaths.pause
wakes up as soon as a rank ends, and so looks first."""

import os
import select
import signal
from pathlib import Path
from typing import IO

from qwenlora.run import heartbeat
from qwenlora.run.rank_deaths import killed_line


class Deaths:
    """Watches the ranks of one node, and reports the first that is killed in the launcher's log."""

    def __init__(self, beats: str, log: IO[bytes], processes: int) -> None:
        """beats: the folder of the ranks' signs of life; processes: the number of ranks."""
        self._beats, self._log, self._processes = beats, log, processes
        self._reported = False
        self._pidfds: dict[int, int] = {}  # by process id; readable once the process has ended; -1: no pidfd
        self._poll = select.poll()

    def __enter__(self) -> "Deaths":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._pidfds.values():
            if descriptor >= 0:
                os.close(descriptor)

    def pause(self, seconds: float) -> None:
        """Sleep, but wake up when a rank ends."""
        for beat in heartbeat.read_beats(self._beats):
            if beat.pid not in self._pidfds:
                try:
                    self._pidfds[beat.pid] = os.pidfd_open(beat.pid)
                except OSError:  # it has ended, or this kernel has no pidfds
                    self._pidfds[beat.pid] = -1
                else:
                    self._poll.register(self._pidfds[beat.pid], select.POLLIN)
        for descriptor, _ in self._poll.poll(seconds * 1000):
            self._poll.unregister(descriptor)

    def reports_failure(self) -> bool:
        """Report the first rank that a signal killed, once; return whether it was reported now."""
        for beat in heartbeat.read_beats(self._beats):
            if number := _ended_by(beat.pid):
                return self._report(beat.rank, number)
        return False

    def report_exit_code(self, code: int) -> None:
        """Report an only rank whose death was not seen, from the launcher's exit code: 247 means signal 9."""
        beats = heartbeat.read_beats(self._beats)
        if self._processes == len(beats) == 1 and 256 - code in signal.valid_signals():
            self._report(beats[0].rank, 256 - code)

    def _report(self, rank: int, number: int) -> bool:
        if self._reported:
            return False
        self._reported = True
        self._log.write(killed_line(f"rank-{rank}", number).encode())
        self._log.flush()
        return True


def _ended_by(pid: int) -> int:
    """Return the signal that killed a process not reaped yet, else 0. Source: proc_pid_stat(5), exit_code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return int(fields[-1]) & 0x7F if fields[0] == "Z" else 0
