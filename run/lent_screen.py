"""The agent's screen, lent to rank 0 when the launcher between them writes to its own standard output.

The open file itself is handed over through a socket (SCM_RIGHTS, unix(7)), so a terminal stays a terminal,
and a redirected file keeps one position for all who write to it.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lend(folder: str) -> Iterator[str]:
    """Lend this process' standard output while the block runs; yield the path to borrow it at."""
    path = str(Path(folder) / "screen")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threading.Thread(target=_hand_out, args=(listener,), daemon=True).start()
        try:
            yield path
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _hand_out(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        with connection, suppress(OSError):  # the borrower may be gone
            socket.send_fds(connection, [b"screen"], [1])


def borrow(path: str) -> int:
    """Return a descriptor of the lent screen, or of this process' own standard output without a path."""
    if not path:
        return os.dup(1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10.0)
        connection.connect(path)
        _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
    return descriptors[0]
