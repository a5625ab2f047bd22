"""What an agent watches while its ranks run: other agents, signs of life, and Slurm when it stops the job."""

import time
from collections.abc import Sequence

from qwenlora.launch import stalls
from qwenlora.launch.causes import cause_of_stop
from qwenlora.launch.deaths import Deaths
from qwenlora.launch.driver import GpuFaults
from qwenlora.launch.forkserver import Forked
from qwenlora.launch.messages import (
    AgentLost,
    AgentMessage,
    EndRanks,
    RankPosition,
    RankPositions,
    RanksEnded,
    RunOver,
    WriteStacks,
)
from qwenlora.launch.node import Node
from qwenlora.run.heartbeat import read_beats
from qwenlora.slurm import query

GRACE_S = 10.0  # for ranks to end by themselves, with their reason, when others have failed
LEAVING_S = 60.0  # from the end of the ranks here to the end of those elsewhere
STACKS_S = 3.0  # for all nodes to write their stacks
SUSPENDED_S = 30.0  # in which an agent has not looked: Slurm had stopped it, and its ranks


class Watch:
    """Watches one attempt on one node. fault: what went wrong, where the ranks cannot report it; beats: the
    folder of the ranks' signs of life, once they start; cause: why Slurm ended the attempt (causes.py);
    lost: hosts whose agents are gone; absent: those that did not come, or were lost; behind: those whose
    ranks hung, each with whether they only wait for a disk; gpu_faults: what drivers said, by host; failures:
    reports when a rank has failed, once ranks run. started, ranks_started: time.monotonic() of the attempt's
    start, and of its ranks', or of when they went on after the job was suspended."""

    def __init__(self, node: Node, attempt: int) -> None:
        self.node, self.attempt = node, attempt
        self.fault = self.beats = self.cause = ""
        self.failures: Forked | Deaths | None = None
        self.lost: list[str] = []
        self.absent: Sequence[str] = ()
        self.behind: dict[str, bool] = {}
        self.gpu_faults: dict[str, str] = {}
        self.run_over = False
        self._asked_slurm = self._stalled = False
        self._kill_at = float("inf")
        self.started = self.ranks_started = self._looked = time.monotonic()
        self._gpus = GpuFaults() if node.allocation.job_id else None
        self._ended: set[int] = set()  # nodes whose ranks have ended
        self._positions: dict[int, list[RankPosition]] = {}  # by node

    def while_preparing(self) -> None:
        """Look once, only for what ends the preparation."""
        self._ask_slurm()
        while message := self.node.meeting.receive():
            if isinstance(message, AgentLost):
                self._lose(message.node)
        if self.fault:
            self.node.children.kill()

    def while_training(self) -> None:
        """Look once; called several times a second."""
        if self.failures and self.failures.reports_failure():
            self._end_within(GRACE_S)  # the other ranks wait for the one that failed
        self._ask_slurm()
        while message := self.node.meeting.receive():
            self._handle(message)
        before, self._looked = self._looked, time.monotonic()
        if self._looked > before + SUSPENDED_S:
            self.ranks_started = self._looked
        if self.beats and not self._stalled and self._is_stalled():
            self._on_stall()
        if time.monotonic() > self._kill_at:
            self.node.children.kill()

    def after(self, code: int) -> None:
        """Wait for the other nodes' ranks, when this node's have ended; let those nodes go whose ranks have
        not ended in time. code: of this node's launcher."""
        node, meeting = self.node, self.node.meeting
        if not node.allocation.first:
            return
        if code:
            self._end_within(GRACE_S)
            self._hear_of_gpus(self.ended(code), node.allocation.host)
        deadline = time.monotonic() + (2 * GRACE_S if code else LEAVING_S)  # ranks that finish leave together
        while (late := node.others - self._ended) and time.monotonic() < deadline:
            if message := meeting.receive(0.2):
                self._handle(message)
        for number in late:
            self._lose(number, "does not end its ranks")
            meeting.drop(number)

    def ended(self, code: int) -> RanksEnded:
        """Return what this node says when its ranks have ended. code: of their launcher."""
        return RanksEnded(code=code, gpu_fault=self._gpus.first() if code and self._gpus else "")

    def _hear_of_gpus(self, message: RanksEnded, host: str) -> None:
        if message.gpu_fault:
            self.gpu_faults[host] = message.gpu_fault

    def _handle(self, message: AgentMessage) -> None:
        match message:
            case RanksEnded():
                self._ended.add(message.node)
                self._hear_of_gpus(message, self._hosts[message.node])
                if message.code:
                    self._end_within(GRACE_S)
            case RunOver():
                self.run_over = True
            case AgentLost() if self._hosts[message.node] not in self.lost:
                self._lose(message.node)
            case EndRanks():
                self._end_within(message.within_s)
            case RankPositions():
                self._positions[message.node] = message.ranks
                if not self._stalled:
                    self._on_stall()
            case WriteStacks():
                self._stalled = True
                self._send_positions()
                self._write_stacks()

    def _end_within(self, seconds: float) -> None:
        """Kill this node's ranks, unless they end within so many seconds; the first node has all do so."""
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)
        if self.node.allocation.first:
            self.node.meeting.send(EndRanks(within_s=seconds))

    def _lose(self, node: int, how: str = "is gone: killed, or its node failed") -> None:
        if not self.node.trains(self._hosts[node]):
            return  # a spare one, or it was let go before
        self.lost.append(self._hosts[node])
        if node in self._ended:  # its ranks did what they had to
            return
        self.fault = self.fault or f"the agent of {self._hosts[node]} {how}"
        self._end_within(0.0)  # they would wait for its ranks

    @property
    def _hosts(self) -> tuple[str, ...]:
        """All nodes of the job, by the numbers that messages have."""
        return self.node.meeting.allocation.hosts

    # ---- ranks that hang

    def _is_stalled(self) -> bool:
        limit_s = self.node.config.launch.stall_timeout_s
        return stalls.is_stalled(read_beats(self.beats), self.node.processes, self.ranks_started, limit_s)

    def _on_stall(self) -> None:
        """Make all ranks write their stacks. The first node then ends the attempt; fault: who is behind."""
        self._stalled = True
        if not self.node.allocation.first:
            self._send_positions()
            self._write_stacks()
            return
        here = stalls.positions(self.beats)
        self.node.meeting.send(WriteStacks())
        self._write_stacks()
        self._positions[0] = here
        end = time.monotonic() + STACKS_S
        while len(self._positions) < len(self.node.others) + 1 and time.monotonic() < end:
            if message := self.node.meeting.receive(0.1):
                self._handle(message)
        self.fault = self._describe_stall()
        self._end_within(0.0)

    def _send_positions(self) -> None:
        self.node.meeting.send(RankPositions(ranks=stalls.positions(self.beats)))

    def _write_stacks(self) -> None:
        stalls.write_stacks(self.beats, self.node.folder.flight_recorder(self.attempt))

    def _describe_stall(self) -> str:
        node = self.node
        positions = [(self._hosts[number], ranks) for number, ranks in self._positions.items()]
        ranks, logs = node.allocation.nodes * node.processes, node.folder.logs(self.attempt)
        limit_s = node.config.launch.stall_timeout_s
        heard = dict(positions).keys() | {self._hosts[number] for number in self._ended}
        if silent := [host for host in node.allocation.hosts if host not in heard]:
            quiet_s = max((one.quiet_s for _, of_host in positions for one in of_host), default=limit_s)
            return (
                f"{', '.join(silent)}: no answer, and no progress of the others' ranks for {quiet_s:.0f} s"
                f" (launch.stall_timeout_s is {limit_s}); their stacks are in {logs}/rank-*.log"
            )
        self.behind = stalls.hosts_behind(positions, node.processes)
        return stalls.describe_stall(positions, ranks, limit_s, logs)

    # ---- what Slurm does

    def _ask_slurm(self) -> None:
        """Ask Slurm, once, why this node is to stop, and record it at once: there may be no time later."""
        node, allocation = self.node, self.node.allocation
        if not node.stop_requested or self._asked_slurm or not allocation.first or not allocation.job_id:
            return
        self._asked_slurm = True
        job = query.ask(allocation.job_id, allocation.restarts)
        self.cause = cause_of_stop(job, node.children.stop_signal)
        if self.cause and self.attempt:
            node.folder.note_attempt(cause=self.cause)

    def cause_of_the_end(self) -> str:
        """Return why Slurm ended this attempt (causes.py); empty if it did not. It may show the reason of a
        stop signal only after the signal."""
        self._asked_slurm = self._asked_slurm and self.cause != ""
        self._ask_slurm()
        return self.cause
