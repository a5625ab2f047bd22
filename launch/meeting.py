"""The connections between the agents of a run: lines of JSON to and from the first one, over TCP.
They stay open as long as the agents live. The port is the first free one of a few that follow from the job's
id, so nobody has to announce it; a token keeps jobs apart that share a node."""

import hmac
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from qwenlora.launch.allocation import FIRST_PORT, PORTS, Allocation, candidate_ports
from qwenlora.launch.messages import AgentLost, AgentMessage, RunOver, decode, encode

RETRY_S = 0.2
HELLO_S = 10.0  # for a new connection to say who it is
HELLO_BYTES = 4096  # strangers may send anything
# a node without power or network says nothing more: its connection ends IDLE_S + PROBES * PROBE_S later
IDLE_S, PROBE_S, PROBES = 4, 3, 3
SETTLE_S = 0.5  # from the end of a process until srun has noticed it
_UNTIL_EXIT: list[socket.socket] = []
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

M = TypeVar("M", bound=AgentMessage)


class NotMet(Exception):  # noqa: N818 (nothing is wrong with the code)
    """Nodes did not come, or cannot be reached; the text names them. absent: those that did not come, while
    most did."""

    def __init__(self, text: str, absent: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.absent = absent


class Meeting:
    """One side of the connections. On the first node `send` reaches all others, elsewhere the first one."""

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.run_id = allocation.name or f"{allocation.job_id}.{allocation.restarts}"
        # in a job the secret is the batch shell's (slurm/job.sh): everybody can see the job's id.
        # the host keeps the meetings of a run apart: another node may lead later
        secret = allocation.secret or os.environ.get("QWENLORA_SECRET", "")
        self._token = f"{self.run_id} {allocation.hosts[0]} {secret}"
        self._over = self._closed = False
        self._left: set[int] = set()
        self._dropped: set[int] = set()
        self._released: set[int] = set()
        self.inbox: queue.Queue[AgentMessage] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}
        self._sending = threading.Lock()  # a node hears that it is admitted before anything else
        self._listener: socket.socket | None = None
        self.port = 0

    def __enter__(self) -> "Meeting":
        if self.allocation.nodes > 1 and self.allocation.first:
            self._listener = self._listen()
            threading.Thread(target=self._accept_all, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for connection in [*self._peers.values(), *filter(None, [self._listener])]:
            _close(connection)

    def _listen(self) -> socket.socket:
        ports = candidate_ports(self.run_id)
        for port in ports:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                # on all addresses: a node's own name may mean 127.0.1.1 to itself
                listener.bind(("", port))
            except OSError:
                listener.close()
                continue
            listener.listen(self.allocation.nodes)
            self.port = port
            return listener
        raise NotMet(f"{self.allocation.host}: the ports {ports}, at which agents meet, are all in use")

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(RETRY_S)
                continue
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Admit a node of this job; close the connection of anybody else."""
        connection.settimeout(HELLO_S)
        lines = connection.makefile("r", encoding="utf-8")
        try:
            hello = json.loads(lines.readline(HELLO_BYTES))
            node, token = hello["node"], str(hello["token"])
            known = hmac.compare_digest(token.encode(), self._token.encode())
            if not known or node not in range(1, self.allocation.nodes) or node in self._peers:
                raise ValueError
        except _MALFORMED:
            _close(connection)
            return
        connection.settimeout(None)
        _notice_silence(connection)
        with self._sending:
            self._peers[node] = connection
            _send_line(connection, json.dumps({"met": self.run_id}))
            if self._over:
                _send_line(connection, encode(RunOver()))
        self._receive_all(node, lines)

    def join(self, timeout_s: float, stop_requested: Callable[[], bool]) -> None:
        """Connect to the first node. Raises: NotMet after timeout_s, or at a stop request."""
        port, first = candidate_ports(self.run_id)[0], self.allocation.hosts[0]
        end, problem = time.monotonic() + timeout_s, "no agent answers there"
        while True:
            for candidate in candidate_ports(self.run_id):
                try:
                    if self._join_at(first, candidate):
                        return
                except _MALFORMED as error:
                    problem = str(error)
                if stop_requested() or time.monotonic() > end:
                    raise NotMet(
                        f"{self.allocation.host}: cannot reach {first} at port {port} within {timeout_s:.0f}"
                        f" s ({problem}); agents use the ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
                    )
            time.sleep(RETRY_S)

    def wait_for_all(self, timeout_s: float, stop_requested: Callable[[], bool]) -> None:
        """Wait until all other nodes have come, or the time is over."""
        end, others = time.monotonic() + timeout_s, self.allocation.nodes - 1
        while len(self._peers) < others and time.monotonic() < end and not stop_requested():
            time.sleep(RETRY_S)

    def _join_at(self, host: str, port: int) -> bool:
        """Connect to one port; return whether the first node's agent of this run answers there."""
        connection = socket.create_connection((host, port), timeout=2.0)
        lines = connection.makefile("r", encoding="utf-8")
        _send_line(connection, json.dumps({"token": self._token, "node": self.allocation.node}))
        if json.loads(lines.readline(HELLO_BYTES) or "{}").get("met") != self.run_id:
            _close(connection)
            return False
        connection.settimeout(None)
        _notice_silence(connection)
        self._peers[0] = connection
        threading.Thread(target=self._receive_all, args=(0, lines), daemon=True).start()
        return True

    def _receive_all(self, node: int, lines: Iterable[str]) -> None:
        with suppress(*_MALFORMED):
            for line in lines:
                self.inbox.put(decode(line, node, time.time()))
        self._left.add(node)
        self.inbox.put(AgentLost(node=node))

    def send(self, message: AgentMessage) -> None:
        """Send to the other side; agents that are gone are ignored."""
        line = encode(message)
        with self._sending:
            for connection in self._peers.values():
                _send_line(connection, line)

    @property
    def connected(self) -> set[int]:
        """The other side's nodes whose agents are there."""
        return self._peers.keys() - self._left - self._dropped - self._released

    def drop(self, node: int) -> None:
        """Have a node's agent end its ranks, and leave; end the connection to it."""
        self._dropped.add(node)
        _send_line(self._peers[node], encode(RunOver()))
        _close(self._peers[node])

    def release(self, node: int) -> None:
        """Have a node's agent leave, which is not needed any more."""
        self._released.add(node)
        _send_line(self._peers[node], encode(RunOver()))

    def receive(self, timeout_s: float = 0.0) -> AgentMessage | None:
        """Return the next message, or None when none came in time."""
        try:
            return self.inbox.get(timeout=timeout_s) if timeout_s else self.inbox.get_nowait()
        except queue.Empty:
            return None

    def stay_until_exit(self) -> None:
        """Keep the connection open until this process has ended: only then may the first node leave."""
        _UNTIL_EXIT.extend(self._peers.values())
        self._peers.clear()

    def part(self, timeout_s: float, *, of_all: bool) -> bool:
        """Tell the other nodes that the run is over; wait until their processes have ended and srun knows it.
        of_all: also wait for nodes that have not come yet, which still look for this one. Return whether no
        agent is left, as far as their connections tell."""
        with self._sending:
            self._over = True
        self.send(RunOver())
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            expected = self.allocation.nodes - 1 if of_all else len(self._peers)
            if len(self._left) >= expected:
                break
            time.sleep(RETRY_S)
        if self._peers:
            time.sleep(SETTLE_S)
        return not self._peers.keys() - self._left and not self._dropped

    def gather(
        self, kind: type[M], timeout_s: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> dict[int, M]:
        """Return {node: its message} of all other nodes; at a stop request, those so far. Raises: NotMet."""
        answers: dict[int, M] = {}
        end = time.monotonic() + timeout_s
        while len(answers) < self.allocation.nodes - 1 and not stop_requested():
            message = self.receive(RETRY_S)
            if isinstance(message, kind):
                answers[message.node] = message
            elif isinstance(message, AgentLost):
                host = self.allocation.hosts[message.node]
                raise NotMet(f"{host}: its agent ended; its output says why", [host])
            if time.monotonic() > end:
                raise self._no_answer(answers.keys(), timeout_s)
        return answers

    def _no_answer(self, answered: Iterable[int], timeout_s: float) -> NotMet:
        hosts, known = self.allocation.hosts, {0, *answered}
        missing = [host for node, host in enumerate(hosts) if node not in known]
        return NotMet(
            f"{', '.join(missing)}: no answer within {timeout_s:.0f} s, of {len(hosts)} nodes; is port"
            f" {self.port} of {self.allocation.host} open to it, and does Python start there"
            " (launch.join_timeout_s)?",
            missing if 2 * len(missing) < len(hosts) else (),
        )


def _send_line(connection: socket.socket, line: str) -> None:
    with suppress(OSError):
        connection.sendall(line.encode() + b"\n")


def _notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other side's machine does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    # what was sent and is not acknowledged holds the probes back
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (IDLE_S + PROBE_S * PROBES))


def _close(connection: socket.socket) -> None:
    """Close a connection for the other side, too: a thread that reads from it would keep it open."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
