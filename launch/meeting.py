"""How the agents of a job's nodes talk: lines of JSON to and from the first one, over TCP, for as long as
they live.

The port follows from the job's id, so that nobody needs to be told, and is the first of a few that is free; a
token keeps jobs apart that share a node. Nothing that is received is more than data (json, no pickle).
"""

import hmac
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qwenlora.launch.allocation import FIRST_PORT, PORTS, Allocation, candidate_ports

RETRY_S = 0.2
HELLO_S = 10.0  # for who connects to say who it is
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
        self.run_id = allocation.name or f"{allocation.job_id}.{allocation.restarts}"
        # in a job the batch shell's secret (slurm/job.sh): who knows the job's id only is no node of it
        self._token = f"{self.run_id} {allocation.secret or os.environ.get('QWENLORA_SECRET', '')}"
        self._over = self._closed = False
        self._left: set[int] = set()
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
        self._closed = True
        for one in [*self._peers.values(), *filter(None, [self._listener])]:
            _close(one)

    def _listen(self) -> socket.socket:
        for port in candidate_ports(self.run_id):
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
        raise NotMet(
            f"{self.allocation.host}: none of the ports {candidate_ports(self.run_id)} can be listened at:"
            " all in use"
        )

    def _welcome(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(RETRY_S)
                continue
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Take in a node of this job; another job's, or a stranger, is sent away."""
        connection.settimeout(HELLO_S)
        lines = connection.makefile("r", encoding="utf-8")
        try:
            hello = json.loads(lines.readline(4096))
            node, token = hello["node"], str(hello["token"])
            known = hmac.compare_digest(token.encode(), self._token.encode())
            if not known or node not in range(1, self.allocation.nodes) or node in self._peers:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            _close(connection)
            return
        connection.settimeout(None)
        with self._speaking:
            self._peers[node] = connection
            _say(connection, {"met": self.run_id})
            if self._over:
                _say(connection, {"over": True})
        self._listen_to(node, lines)

    def join(self, timeout_s: float, asked: Callable[[], bool]) -> None:
        """Reach the first node from another one. Raises: NotMet after timeout_s, or when this node is asked
        to stop."""
        ports = candidate_ports(self.run_id)
        first, end, why = self.allocation.hosts[0], time.monotonic() + timeout_s, "nothing listens there"
        while True:
            for port in ports:
                try:
                    connection = socket.create_connection((first, port), timeout=2.0)
                    lines = connection.makefile("r", encoding="utf-8")
                    hello = {"token": self._token, "node": self.allocation.node}
                    _say(connection, hello)
                    if json.loads(lines.readline(4096) or "{}").get("met") == self.run_id:
                        connection.settimeout(None)
                        self._peers[0] = connection
                        threading.Thread(target=self._listen_to, args=(0, lines), daemon=True).start()
                        return
                    _close(connection)
                except (OSError, ValueError, AttributeError, RecursionError) as error:
                    why = str(error)
                if asked() or time.monotonic() > end:
                    raise NotMet(
                        f"{self.allocation.host}: cannot reach {first} at port {ports[0]} within"
                        f" {timeout_s:.0f} s ({why}); agents talk at ports {FIRST_PORT} to"
                        f" {FIRST_PORT + PORTS - 1}"
                    )
            time.sleep(RETRY_S)

    def _listen_to(self, node: int, lines: Any) -> None:
        try:
            for line in lines:
                self.inbox.put(json.loads(line) | {"node": node, "received": time.time()})
        except (OSError, ValueError, TypeError, RecursionError):
            pass
        self._left.add(node)
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

    def part(self, timeout_s: float, *, of_all: bool) -> None:
        """Tell the other nodes that all is over, and wait until their processes have ended, and srun may know
        it.

        of_all: also wait for those that have not come yet: they look for this node.
        """
        with self._speaking:
            self._over = True
        self.send(over=True)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            expected = self.allocation.nodes - 1 if of_all else len(self._peers)
            if len(self._left) >= expected:
                break
            time.sleep(RETRY_S)
        if self._peers:
            time.sleep(SETTLE_S)

    def gather(
        self, what: str, timeout_s: float, asked: Callable[[], bool] = lambda: False
    ) -> dict[int, Message]:
        """Return {node: its message that has `what`} of all other nodes. Raises: NotMet naming those that say
        nothing.

        asked: whether this node was asked to stop; then what has come so far is returned.
        """
        said: dict[int, Message] = {}
        end = time.monotonic() + timeout_s
        while len(said) < self.allocation.nodes - 1 and not asked():
            message = self.hear(RETRY_S)
            if message and what in message:
                said[message["node"]] = message
            elif message and "lost" in message:
                raise NotMet(
                    f"{self.allocation.hosts[message['node']]}: its agent ended; its output says why"
                )
            if time.monotonic() > end:
                missing = [
                    host for node, host in enumerate(self.allocation.hosts) if node and node not in said
                ]
                raise NotMet(
                    f"{', '.join(missing)}: no answer within {timeout_s:.0f} s, of {self.allocation.nodes}"
                    f" nodes; is port {self.port} of {self.allocation.host} open to it, and does Python start"
                    " there (launch.join_timeout_s)?"
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
