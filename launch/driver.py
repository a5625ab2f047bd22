"""What the driver of this node's GPUs says of faults, where the kernel's log or nvidia-smi can be read."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from qwenlora.run.hardware import GpuQuery

KERNEL_LOG = Path("/dev/kmsg")
TIMEOUT_S = 5.0
# memory that ECC cannot correct or remap (48, 64, 94, 95, 140), links (74), off the bus (79), firmware that
# does not answer (62, 119, 120). Others are mostly a program's: https://docs.nvidia.com/deploy/xid-errors/
XIDS = frozenset({48, 62, 64, 74, 79, 94, 95, 119, 120, 140})
_XID = re.compile(r"NVRM: (Xid \([^)]*\): (\d+),.*)")
_RECORD_BYTES = 8192  # the kernel's longest
_COUNTS = "index,ecc.errors.uncorrected.volatile.total"  # since the GPU was last reset: weeks, maybe


class GpuFaults:
    """What the driver says of faulty GPUs from now on. Where the kernel's log cannot be read, nvidia-smi is
    asked at once what it has counted so far."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._before: GpuQuery | None = None
        try:
            os.close(_open_log())
        except OSError:  # the site lets only root read it
            self._before = GpuQuery(_COUNTS)

    def first(self) -> str:
        """Return the first fault; empty if there is none."""
        if self._before:
            return _more_errors(self._before)
        found = (match for match in map(_XID.search, _lines(self._since)) if match and int(match[2]) in XIDS)
        return next((match[1] for match in found), "")


def _open_log() -> int:
    return os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)


def _lines(since: float) -> Iterator[str]:
    """Yield the lines that the kernel has logged since then. Each read returns one record:
    priority,number,microseconds,flags;text."""
    log = _open_log()
    try:
        while True:
            try:
                record = os.read(log, _RECORD_BYTES)
            except BrokenPipeError:  # it was overwritten before it was read
                continue
            head, _, text = record.decode(errors="replace").partition(";")
            if not record:
                return
            if int(head.split(",")[2]) >= since * 1e6:
                yield text.partition("\n")[0]
    except BlockingIOError:
        return
    finally:
        os.close(log)


def _more_errors(before: GpuQuery) -> str:
    """Return which GPUs have counted more memory errors that ECC could not correct than before."""
    old = _counts(before)
    new = _counts(GpuQuery(_COUNTS)) if old else {}
    bad = [f"GPU {gpu}: {count - old[gpu]}" for gpu, count in new.items() if count > old.get(gpu, count)]
    return f"memory errors that ECC could not correct: {', '.join(bad)}" if bad else ""


def _counts(query: GpuQuery) -> dict[str, int]:
    """Return {GPU: errors} of those that count them."""
    pairs = (values for values in query.answer(TIMEOUT_S) if len(values) == 2)
    return {gpu: int(count) for gpu, count in pairs if count.isdecimal()}
