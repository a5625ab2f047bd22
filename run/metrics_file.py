"""metrics.jsonl, read while it is being written."""

import json
from pathlib import Path

_TAIL = 2**16  # bytes


def last_line(file: Path, key: str) -> dict[str, float] | None:
    """Return the last line that has a key, looking at the end of the file alone; None without one."""
    return next(reversed(last_lines(file, key)), None)


def last_lines(file: Path, key: str) -> list[dict[str, float]]:
    """Return the lines that have a key, oldest first, of the end of the file: some hundreds."""
    if not file.exists():
        return []
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - _TAIL, 0))
        lines = opened.read().splitlines()
    found = []
    for line in lines:
        try:
            record: dict[str, float] = json.loads(line)
        except ValueError:  # half a line
            continue
        if key in record:
            found.append(record)
    return found
