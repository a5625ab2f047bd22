"""A process beside an agent, which kills it when it hangs: when it is stopped (SIGSTOP, a debugger), or waits
for a disk that does not answer. Its ranks end with it (run/orphans.py), the lock of the run folder is free,
and the other agents see that it is gone. It does not wake up to find that another one leads.

An agent starts it (children.py): python -m qwenlora.launch.guard LIMIT_S
"""

import os
import select
import signal
import socket
import sys
from contextlib import suppress
from threading import Thread

TICKS = 30  # in the limit: an agent shows life in each
SAYING_S = 5.0  # the output may be on the disk that the agent waits for


def guard(agent: int, limit_s: float) -> None:
    """Kill the agent when nothing has come on standard input for so long; return when that is closed."""
    silent = 0  # in ticks: Slurm may suspend a job, which stops this process, too
    while silent < TICKS:
        if not select.select([0], [], [], limit_s / TICKS)[0]:
            silent += 1
        elif os.read(0, 4096):
            silent = 0
        else:
            return
    saying = Thread(target=_say, args=(limit_s,), daemon=True)
    saying.start()
    saying.join(SAYING_S)
    os.kill(agent, signal.SIGKILL)  # last: this process ends with it


def _say(limit_s: float) -> None:
    with suppress(OSError):  # the screen may be gone
        host = socket.gethostname()
        print(f"the agent of {host} hung for {limit_s:g} s (launch.stall_timeout_s): killed", flush=True)


if __name__ == "__main__":
    guard(os.getppid(), float(sys.argv[1]))
