"""Asks nvidia-smi whether this machine's GPUs are linked by NVLink, which torch does not know."""

import re
import shutil
import subprocess


def nvlink() -> bool:
    """Return whether this machine's GPUs all reach each other over NVLink."""
    if not shutil.which("nvidia-smi"):
        return False
    topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False)
    return topology.returncode == 0 and all_linked(topology.stdout)


def all_linked(topology: str) -> bool:
    """Return whether `nvidia-smi topo -m`'s table shows NVLinks (as NV18) between every pair of GPUs."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)  # it underlines the header
    rows = [
        line.split()
        for line in plain.splitlines()
        if re.match(r"GPU\d+\s+(X|NV\d|PIX|PXB|PHB|NODE|SYS)", line)
    ]
    table = [row[1 : 1 + len(rows)] for row in rows]
    pairs = [cell for i, row in enumerate(table) for j, cell in enumerate(row) if i != j]
    return bool(pairs) and all(re.fullmatch(r"NV\d+", cell) for cell in pairs)
