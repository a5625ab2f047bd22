"""The agent's screen, lent to rank 0."""

import os

from qwenlora.run.lent_screen import borrow, lend


def test_a_lent_screen_is_the_same_open_file(tmp_path, capfd):
    with lend(str(tmp_path)) as path:
        for _ in range(2):
            with os.fdopen(borrow(path), "w") as screen:
                screen.write("hello\n")
    assert capfd.readouterr().out == "hello\nhello\n"
