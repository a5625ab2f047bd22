"""How the agents of a job's nodes talk: lines of JSON to and from the first one, over TCP, for as long as they live.

The port follows from the job's id, so that nobody needs to be told, and is the first of a few that is free; a token
keeps jobs apart that share a node. Nothing that is received is more than data (json, no pickle).
"""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qwenlora.launch.allocation import FIRST_PORT, PORTS, Allocation, candidate_ports

RETRY_S = 0.2
SETTLE_S = 0.5  # between the end of a process and srun's knowing of it
Message = dict[str, Any]
_UNTIL_EXIT: list[socket.socket] = []


class NotMet(Exception):  # noqa: N818 (nothing is wrong with the code)
    """Nodes that did not come, or cannot be reached; the text names them."""


class Meeting:
    """One side of the talk. On the first node `send` tells all others, elsewhere the first one.

    `inbox` has what came, each with its "node"; {"node", "lost": True} when a connection ended.
    """

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.token = f"{allocation.job_id}.{allocation.restarts}"
        self.inbox: queue.Queue[Message] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}
        self._speaking = threading.Lock()  # a node that is taken in hears that first
        self._listener: socket.socket | None = None
        self.port = 0

    def __enter__(self) -> "Meeting":
        if self.allocation.nodes > 1 and self.allocation.first:
            self._listener = self._listen()
            threading.Thread(target=self._welcome, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in [*self._peers.values(), *filter(None, [self._listener])]:
            _close(one)

    def _listen(self) -> socket.socket:
        for port in candidate_ports(self.token):
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self.allocation.host, port))
            except OSError:
                listener.close()
                continue
            listener.listen(self.allocation.nodes)
            self.port = port
            return listener
        raise NotMet(
            f"{self.allocation.host}: none of the ports {candidate_ports(self.token)} can be listened at: all in use,"
            " or the name is not this machine's"
        )

    def _welcome(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: the meeting is over
                return
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Take in a node of this job; another job's, or a stranger, is sent away."""
        lines = connection.makefile("r", encoding="utf-8")
        try:
            hello = json.loads(lines.readline(65536))
            node = hello["node"]
            if hello["token"] != self.token or not 0 < node < self.allocation.nodes:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            _close(connection)
            return
        with self._speaking:
            self._peers[node] = connection
            _say(connection, {"token": self.token})
        self._listen_to(node, lines)

    def join(self, timeout_s: float, asked: Callable[[], bool]) -> None:
        """Reach the first node from another one. Raises: NotMet after timeout_s, or when this node is asked to stop."""
        first, end, why = self.allocation.hosts[0], time.monotonic() + timeout_s, "nothing listens there"
        while True:
            for port in candidate_ports(self.token):
                try:
                    connection = socket.create_connection((first, port), timeout=2.0)
                    lines = connection.makefile("r", encoding="utf-8")
                    hello = {"token": self.token, "node": self.allocation.node}
                    _say(connection, hello)
                    if json.loads(lines.readline(65536) or "{}").get("token") == self.token:
                        connection.settimeout(None)
                        self._peers[0] = connection
                        threading.Thread(target=self._listen_to, args=(0, lines), daemon=True).start()
                        return
                    _close(connection)
                except (OSError, ValueError) as error:
                    why = str(error)
                if asked() or time.monotonic() > end:
                    raise NotMet(
                        f"{self.allocation.host}: cannot reach {first} at port {candidate_ports(self.token)[0]} within"
                        f" {timeout_s:.0f} s ({why}); agents talk at ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
                    )
            time.sleep(RETRY_S)

    def _listen_to(self, node: int, lines: Any) -> None:
        try:
            for line in lines:
                self.inbox.put(json.loads(line) | {"node": node, "received": time.time()})
        except (OSError, ValueError):
            pass
        self.inbox.put({"node": node, "lost": True})

    def send(self, **message: Any) -> None:
        """Tell the other side; one that is gone is not told."""
        with self._speaking:
            for connection in self._peers.values():
                _say(connection, message)

    def hear(self, timeout_s: float = 0.0) -> Message | None:
        """Return the next message, or None when none came in time."""
        try:
            return self.inbox.get(timeout=timeout_s) if timeout_s else self.inbox.get_nowait()
        except queue.Empty:
            return None

    def stay_until_exit(self) -> None:
        """Leave the connection open until this process has ended: that is when the first node may leave."""
        _UNTIL_EXIT.extend(self._peers.values())
        self._peers.clear()

    def wait_for_all_to_leave(self, timeout_s: float) -> None:
        """Wait until the other nodes' processes have ended, and srun may know it."""
        end = time.monotonic() + timeout_s
        left = set(self._peers)
        while left and time.monotonic() < end:
            if (message := self.hear(RETRY_S)) and "lost" in message:
                left.discard(message["node"])
        if self._peers:
            time.sleep(SETTLE_S)

    def gather(self, what: str, timeout_s: float, asked: Callable[[], bool] = lambda: False) -> dict[int, Message]:
        """Return {node: its message that has `what`} of all other nodes. Raises: NotMet naming those that say nothing.

        asked: whether this node was asked to stop; then what has come so far is returned.
        """
        said: dict[int, Message] = {}
        end = time.monotonic() + timeout_s
        while len(said) < self.allocation.nodes - 1 and not asked():
            message = self.hear(RETRY_S)
            if message and what in message:
                said[message["node"]] = message
            elif message and ("refused" in message or "lost" in message):
                host = self.allocation.hosts[message["node"]]
                raise NotMet(f"{host}: {message.get('refused', 'its agent ended; its output says why')}")
            if time.monotonic() > end:
                missing = [host for node, host in enumerate(self.allocation.hosts) if node and node not in said]
                raise NotMet(
                    f"{', '.join(missing)}: no answer within {timeout_s:.0f} s, of {self.allocation.nodes} nodes; is"
                    f" port {self.port} of {self.allocation.host} open to it, and does Python start there"
                    " (launch.join_timeout_s)?"
                )
        return said


def _say(connection: socket.socket, message: Message) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(message, ensure_ascii=False).encode() + b"\n")


def _close(connection: socket.socket) -> None:
    """Close it for the other side, too: a thread that reads from it would keep it open."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
