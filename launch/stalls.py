"""Ranks that make no progress: who is behind, and the stacks of all."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from qwenlora.launch.messages import RankPosition
from qwenlora.run.heartbeat import STACKS_SIGNAL, Beat, read_beats

SLOWEST_START_S = 1800.0  # between two beats before the first step: a large base may come from a slow disk
STACKS_WRITTEN_S = 1.0
_WAITS_FOR_DISK = "its process waits for a disk or a network file system"
_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped: SIGSTOP, or a debugger",
    psutil.STATUS_TRACING_STOP: "its process is stopped: a debugger",
    psutil.STATUS_DISK_SLEEP: _WAITS_FOR_DISK,
    psutil.STATUS_ZOMBIE: "its process has ended",
}


def is_stalled(beats: Sequence[Beat], processes: int, started: float, limit_s: float) -> bool:
    """Whether a rank of this node makes no progress for too long. started: time.monotonic() when they did, or
    went on."""
    now = time.monotonic()
    if len(beats) < processes or not all(beat.step for beat in beats):
        last = max([started, *(beat.at for beat in beats)])
        return now - last > max(limit_s, SLOWEST_START_S)
    return any(now - max(beat.at, started) > limit_s for beat in beats)


def positions(folder: str) -> list[RankPosition]:
    """Return how far this node's ranks are. folder: of their signs of life."""
    now = time.monotonic()
    return [RankPosition(beat, _state(beat), now - beat.at) for beat in read_beats(folder)]


def write_stacks(folder: str, flight_recorder: str) -> None:
    """Make this node's ranks log their stacks, and NCCL its collectives. flight_recorder: as in RunFolder."""
    for beat in read_beats(folder):
        try:
            os.kill(beat.pid, STACKS_SIGNAL)
        except ProcessLookupError:
            continue
        pipe = Path(f"{flight_recorder}{beat.rank}.pipe")
        if pipe.exists():  # NCCL made it; a byte in it makes NCCL dump
            _write_byte(pipe)
    time.sleep(STACKS_WRITTEN_S)


def describe_stall(
    positions: Iterable[tuple[str, Sequence[RankPosition]]], ranks: int, limit_s: int, logs: Path
) -> str:
    """Return which ranks are behind, on one line. positions: of each host; ranks: how many the run has."""
    placed = [(position, host) for host, of_host in positions for position in of_host]
    stacks = f"the stacks of all ranks are in {logs}/rank-*.log"
    limit = f"launch.stall_timeout_s is {limit_s}"
    if missing := ranks - len(placed):
        started = ", ".join(str(position.beat.rank) for position, _ in placed) or "none"
        return f"{missing} ranks have not started to work ({limit}); those that have: {started}; {stacks}"
    behind = _those_behind(placed)
    first = behind[0][0]
    quiet = f"no progress for {max(position.quiet_s for position, _ in placed):.0f} s ({limit})"
    if _are_alike(behind, placed):
        return f"{quiet} of any rank, all at the same point of step {first.beat.step}; {stacks}"
    names = ", ".join(f"rank {position.beat.rank} on {host}" for position, host in behind)
    state = f" ({first.state})" if first.state else ""
    return f"{names}: {quiet}, in step {first.beat.step}{state}, the others wait; {stacks}"


def hosts_behind(positions: Sequence[tuple[str, Sequence[RankPosition]]], processes: int) -> dict[str, bool]:
    """Return the hosts of the ranks that describe_stall names, each with whether all that these do is to wait
    for a disk, which other nodes may share. positions: of each host; processes: ranks of each."""
    placed = [(position, host) for host, of_host in positions for position in of_host]
    if late := [host for host, of_host in positions if len(of_host) < processes]:
        return dict.fromkeys(late, False)
    behind = _those_behind(placed)
    if _are_alike(behind, placed):
        return {}
    others = {host for position, host in behind if position.state != _WAITS_FOR_DISK}
    return {host: host not in others for _, host in behind}


def _those_behind(ranks: list[tuple[RankPosition, str]]) -> list[tuple[RankPosition, str]]:
    """Return the ranks whose processes do not run; without any, those with the fewest signs of life."""
    fewest = min(position.beat.beats for position, _ in ranks)
    not_running = [rank for rank in ranks if rank[0].state]
    return not_running or [rank for rank in ranks if rank[0].beat.beats == fewest]


def _are_alike(behind: list[tuple[RankPosition, str]], ranks: list[tuple[RankPosition, str]]) -> bool:
    """Whether all ranks are at the same point, and run: then none is behind the others."""
    return len(behind) == len(ranks) > 1 and not behind[0][0].state


def _state(beat: Beat) -> str:
    try:
        return _STATES.get(psutil.Process(beat.pid).status(), "")
    except psutil.NoSuchProcess:
        return "its process has ended"


def _write_byte(pipe: Path) -> None:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    os.write(descriptor, b"1")
    os.close(descriptor)
