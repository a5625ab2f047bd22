"""What the driver of this node's GPUs says of faults, where the kernel's log or nvidia-smi can be read."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

KERNEL_LOG = Path("/dev/kmsg")
TIMEOUT_S = 5.0
# memory that ECC cannot correct or remap (48, 64, 94, 95, 140), links (74), off the bus (79), firmware that
# does not answer (62, 119, 120). Others are mostly a program's: https://docs.nvidia.com/deploy/xid-errors/
XIDS = frozenset({48, 62, 64, 74, 79, 94, 95, 119, 120, 140})
_XID = re.compile(r"NVRM: (Xid \([^)]*\): (\d+),.*)")
_RECORD_BYTES = 8192  # the kernel's longest


def gpu_fault(since: float) -> str:
    """Return what the driver has said of a faulty GPU; empty if nothing. since: time.monotonic()."""
    try:
        lines = list(_lines(since))
    except OSError:  # the site lets only root read it
        return _uncorrected_memory()
    found = (match for match in map(_XID.search, lines) if match and int(match[2]) in XIDS)
    return next((match[1] for match in found), "")


def _lines(since: float) -> Iterator[str]:
    """Yield the lines that the kernel has logged since then. Each read returns one record:
    priority,number,microseconds,flags;text."""
    log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
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


def _uncorrected_memory() -> str:
    """Return which GPUs have counted memory errors that ECC could not correct, since they were last reset."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = [
        "nvidia-smi",
        "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    counts = (line.split(", ") for line in answer.stdout.splitlines() if line.count(", ") == 1)
    bad = [f"GPU {gpu}: {number}" for gpu, number in counts if number.isdecimal() and int(number)]
    return f"memory errors that ECC could not correct: {', '.join(bad)}" if bad else ""
