"""What a node's agent looks at while its ranks run: other nodes, signs of life, and Slurm when it is asked to
stop."""

import os
import time
from pathlib import Path
from typing import Any

import psutil

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.deaths import Deaths
from qwenlora.launch.meeting import Meeting, Message
from qwenlora.launch.plan import processes_of
from qwenlora.run import heartbeat
from qwenlora.run.folder import RunFolder
from qwenlora.run.heartbeat import STACKS_SIGNAL
from qwenlora.slurm import query as answers

GRACE_S = 10.0  # for ranks to end by themselves, and to say why, when others have failed
LEAVING_S = 60.0  # from the end of the ranks here to the end of those elsewhere
NODE_LOSS_S = 30.0  # for Slurm to see that a node is gone
SLOWEST_START_S = 1800.0  # until the first step: a large base may come from a slow disk
STACKS_S = 3.0  # for all nodes to write their stacks
LONGEST_LEAD_S = 840
LEAD_SIGNALS = ("SIGUSR1", "SIGUSR2")
_SLURM_ENDS = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "REQUEUED", "TIMEOUT")


class Watch:
    """Of one attempt on one node. fault: what went wrong, where that is not for the ranks to say.

    over: the first node has said that all is over; lost: another agent is gone; deaths: of ranks here, for a
    launcher that does not say them.
    """

    def __init__(
        self,
        config: Config,
        where: Allocation,
        meeting: Meeting,
        children: Children,
        folder: RunFolder,
        attempt: int,
    ) -> None:
        self.config, self.where, self.meeting, self.children = config, where, meeting, children
        self.folder, self.attempt, self.processes = folder, attempt, processes_of(config)
        self.fault = self.beats = self.cause = ""
        self.deaths: Deaths | None = None
        self._asked_slurm = self._stalled = self.lost = self.over = False
        self._end_by = float("inf")
        self._started = time.monotonic()
        self._ended: set[int] = set()
        self._positions: dict[int, list[Any]] = {}

    def while_preparing(self) -> None:
        """Look once: only what ends the preparation matters."""
        self._ask_slurm()
        while message := self.meeting.hear():
            if "lost" in message:
                self._lose(message["node"])
        if self.fault:
            self.children.kill()

    def while_training(self) -> None:
        """Look once, several times a second."""
        if self.deaths and self.deaths.look():
            self._end_within(GRACE_S)  # the others wait for it
        self._ask_slurm()
        while message := self.meeting.hear():
            self._hear(message)
        if not self._stalled and self._anyone_is_behind():
            self._stalled = True
            self._on_stall()
        if time.monotonic() > self._end_by:
            self.children.kill()

    def _hear(self, message: Message) -> None:
        node = message["node"]
        if "ended" in message:
            self._ended.add(node)
            if message["ended"]:
                self._end_within(GRACE_S)
        elif "over" in message:
            self.over = True
        elif "lost" in message and node not in self._ended:
            self._lose(node)
        elif "end" in message:
            self._end_within(message["end"])
        elif "stalled" in message:
            self._positions[node] = message["stalled"]
            if not self._stalled:
                self._stalled = True
                self._on_stall()
        elif "stacks" in message:
            self._stalled = True
            self.meeting.send(stalled=self._positions_here())
            self._write_stacks()

    def _end_within(self, seconds: float) -> None:
        """Have the ranks of this node, and by the first node those of all, end."""
        self._end_by = min(self._end_by, time.monotonic() + seconds)
        if self.where.first:
            self.meeting.send(end=seconds)

    def _lose(self, node: int) -> None:
        self.lost = True
        self.fault = (
            self.fault or f"the agent of {self.where.hosts[node]} is gone: killed, or its node failed"
        )
        self._end_within(0.0 if self.where.first else GRACE_S)

    def after(self, code: int) -> None:
        """Wait for the other nodes' ranks, when those of this one have ended. code: theirs."""
        if not self.where.first:
            return
        if code:
            self._end_within(GRACE_S)
        deadline = time.monotonic() + (2 * GRACE_S if code else LEAVING_S)  # all ranks leave together
        others = set(range(1, self.where.nodes))
        while others - self._ended and not self.lost and time.monotonic() < deadline:
            if message := self.meeting.hear(0.2):
                self._hear(message)

    # ---- ranks that hang

    def _anyone_is_behind(self) -> bool:
        """Whether a rank of this node has made no progress for too long."""
        now, limit_s = time.monotonic(), self.config.launch.stall_timeout_s
        if now - self._started < limit_s or not self.beats:
            return False
        beats = heartbeat.read(self.beats)
        if len(beats) < self.processes or not all(beat.step for beat in beats):
            return now - self._started > max(limit_s, SLOWEST_START_S)
        return any(now - beat.at > limit_s for beat in beats)

    def _positions_here(self) -> list[tuple[heartbeat.Beat, str, float]]:
        """Return how far each rank of this node is, what its process is at if it does not run, seconds of
        quiet."""
        now = time.monotonic()
        return [(beat, _state(beat), now - beat.at) for beat in heartbeat.read(self.beats)]

    def _on_stall(self) -> None:
        """Have all nodes write their ranks' stacks; the first one then says who is behind, and ends the
        attempt."""
        here = self._positions_here()
        self.meeting.send(**({"stacks": True} if self.where.first else {"stalled": here}))
        self._write_stacks()
        if not self.where.first:
            return
        self._positions[0] = here
        end = time.monotonic() + STACKS_S
        while len(self._positions) < self.where.nodes and time.monotonic() < end:
            if message := self.meeting.hear(0.1):
                self._hear(message)
        self.fault = self._who_lags()
        self._end_within(0.0)

    def _write_stacks(self) -> None:
        """Have each rank of this node write the stacks of its threads into its log (faulthandler, in
        main.py)."""
        for beat in heartbeat.read(self.beats):
            try:
                os.kill(beat.pid, STACKS_SIGNAL)
            except ProcessLookupError:
                continue
            pipe = Path(f"{self.folder.flight_recorder(self.attempt)}{beat.rank}.pipe")
            if pipe.exists():  # made by NCCL; writing to it makes it dump its last collectives
                _poke(pipe)
        time.sleep(1.0)  # for them to be written

    def _who_lags(self) -> str:
        """Return who is behind: processes that do not run, else those with the fewest signs of life."""
        positions = [
            (heartbeat.Beat(*beat), state, quiet_s, self.where.hosts[node])
            for node, here in self._positions.items()
            for beat, state, quiet_s in here
        ]
        logs = f"the stacks of all ranks are in {self.folder.logs(self.attempt)}/rank-*.log"
        limit = f"launch.stall_timeout_s is {self.config.launch.stall_timeout_s}"
        if missing := self.where.nodes * self.processes - len(positions):
            came = ", ".join(str(beat.rank) for beat, *_ in positions)
            return (
                f"{missing} ranks have not started to work ({limit}); those that have: {came or 'none'};"
                f" {logs}"
            )
        fewest = min(beat.beats for beat, *_ in positions)
        behind = [one for one in positions if one[1]] or [one for one in positions if one[0].beats == fewest]
        beat, state, *_ = behind[0]
        quiet = f"no progress for {max(quiet_s for _, _, quiet_s, _ in positions):.0f} s ({limit})"
        if len(behind) == len(positions) > 1 and not state:
            return f"{quiet} of any rank, all at the same point of step {beat.step}; {logs}"
        names = ", ".join(f"rank {beat.rank} on {host}" for beat, _, _, host in behind)
        return f"{names}: {quiet}, in step {beat.step}{f' ({state})' * bool(state)}, the others wait; {logs}"

    # ---- what Slurm does

    def _ask_slurm(self) -> None:
        """Learn, once, why this node is asked to stop, and note it at once: there may be no time later."""
        if not self.children.asked or self._asked_slurm or not self.where.first or not self.where.job_id:
            return
        self._asked_slurm = True
        job = answers.ask(self.where.job_id, self.where.restarts)
        self.cause = slurm_cause(job, self.children.why)
        if self.cause and self.attempt:
            self.folder.note_attempt(cause=self.cause)

    def cause_of_the_end(self) -> str:
        """Return what Slurm did to end this attempt, in its word; empty if it did nothing.

        When a node is lost, Slurm takes a while to see it; when a signal came first, what it was for shows
        later.
        """
        end = time.monotonic() + (NODE_LOSS_S if self.lost and self.where.job_id else 0.0)
        while not self.children.asked and time.monotonic() < end:
            time.sleep(0.2)
        self._asked_slurm = self._asked_slurm and self.cause != ""
        self._ask_slurm()
        return self.cause


def slurm_cause(job: answers.Job | None, why: str) -> str:
    """Return what Slurm is doing to a job that was asked to stop, in its word. why: the signal that came.

    The signal ahead of the time limit comes to a job that runs; so does one that somebody sends.
    """
    if job is None:
        return ""
    if job.state in _SLURM_ENDS:
        return job.state
    if job.preempted:
        return "PREEMPTED"
    if not job.requeue:  # `qwenlora cancel` forbids that, and then has it save
        return "CANCELLED"
    # a lead that was said on sbatch's command line is not known; Slurm sends it up to a minute early
    said = os.environ.get("QWENLORA_LEAD_S", "")
    lead_s = max(int(said) if said.isdecimal() else 0, LONGEST_LEAD_S) + 60
    if why in LEAD_SIGNALS and job.seconds_left is not None and job.seconds_left <= lead_s:
        return "TIMEOUT"
    return ""


_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped: SIGSTOP, or a debugger",
    psutil.STATUS_TRACING_STOP: "its process is stopped: a debugger",
    psutil.STATUS_DISK_SLEEP: "its process waits for a disk or a network file system",
    psutil.STATUS_ZOMBIE: "its process has ended",
}


def _state(beat: heartbeat.Beat) -> str:
    try:
        return _STATES.get(psutil.Process(beat.pid).status(), "")
    except psutil.NoSuchProcess:
        return "its process has ended"


def _poke(pipe: Path) -> None:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    os.write(descriptor, b"1")
    os.close(descriptor)
