"""How this machine's GPUs reach each other, as nvidia-smi says: torch only knows whether they do."""

import re
import shutil
import subprocess


def nvlink() -> bool:
    """Return whether this machine's GPUs all reach each other over NVLink."""
    if not shutil.which("nvidia-smi"):
        return False
    answer = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and is_linked(answer.stdout)


def is_linked(answer: str) -> bool:
    """Return whether every pair of GPUs in `nvidia-smi topo -m`'s table has NVLinks between them, as NV18."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", answer)  # it underlines the header
    rows = [
        line.split()
        for line in plain.splitlines()
        if re.match(r"GPU\d+\s+(X|NV\d|PIX|PXB|PHB|NODE|SYS)", line)
    ]
    between = [row[1 : 1 + len(rows)] for row in rows]
    pairs = [cell for number, row in enumerate(between) for other, cell in enumerate(row) if other != number]
    return bool(pairs) and all(re.fullmatch(r"NV\d+", cell) for cell in pairs)
