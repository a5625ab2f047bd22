"""The screen of a rank: rank 0's console has it, and all that libraries print goes to the log files. Light to
import: libraries that print at import come later."""

import faulthandler
import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, ConsoleDimensions

from qwenlora.run.lent_screen import borrow
from qwenlora.run.lossy_output import lossy

PLAIN_WIDTH = 120  # characters, where the screen is no terminal


class Rank(NamedTuple):
    """This process's number, and how many there are."""

    rank: int
    world_size: int

    @classmethod
    def of_environment(cls) -> "Rank":
        """Return the launcher's numbers; without a launcher, those of a process alone."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def take_screen(file: Path, *, speaks: bool, lent: str = "") -> Console:
    """Redirect all that this process prints, crashes included, to a file; return a console on the screen.
    speaks: false silences the console (ranks other than 0). lent: where the agent lends its screen, if so."""
    descriptor = borrow(lent if speaks else "")
    screen = lossy(os.fdopen(descriptor, "w", encoding=sys.stdout.encoding, errors="backslashreplace"))
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):  # logs are UTF-8, whatever the terminal is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    faulthandler.enable()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("qwenlora").setLevel(logging.INFO)
    width = None if screen.isatty() else PLAIN_WIDTH
    # no markup: the users' names and texts may look like it
    return _Screen(file=screen, quiet=not speaks, width=width, markup=False, highlight=False)


class _Screen(Console):
    """A console as wide as the terminal that it writes to. rich looks at standard input, output and error,
    none of which is the terminal here."""

    @property  # type: ignore[misc]  # rich's can be set, which nobody does here
    def size(self) -> ConsoleDimensions:
        """Columns and rows."""
        with suppress(OSError):  # it is closed
            if self.file.isatty() and "COLUMNS" not in os.environ:
                columns, rows = os.get_terminal_size(self.file.fileno())
                if columns:  # some terminals do not know
                    return ConsoleDimensions(columns, rows)
        return super().size
