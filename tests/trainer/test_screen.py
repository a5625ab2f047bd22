"""The console of rank 0 is as wide as the terminal that it writes to, whatever its other streams are."""

import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

SHOW = """
import sys
from pathlib import Path
from qwenlora.trainer.ranks.screen import take_screen
console = take_screen(Path(sys.argv[1]), speaks=True)
console.print(console.width)
"""


@pytest.mark.parametrize("columns", [60, 200])
def test_on_a_terminal(tmp_path, columns):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-c", SHOW, str(tmp_path / "rank.log")],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=log,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            check=True,
        )
    assert os.read(ours, 100).split() == [str(columns).encode()]


def test_elsewhere_it_has_a_fixed_width(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", SHOW, str(tmp_path / "rank.log")], capture_output=True, check=True
    )
    assert answer.stdout.split() == [b"120"]
