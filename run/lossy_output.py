"""Output for those who watch a run: the run goes on, and saves, when nobody can watch it any more."""

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast


class _LossyOutput:
    """A text stream that loses what it cannot write: its terminal is closed, the pipe has no reader, or the
    disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.EPIPE):  # a full disk may have room again
            return
        # what waits in the buffer must go somewhere: Python flushes it at the end, and would fail there
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


def escape_what_the_terminal_lacks() -> None:
    """Let standard output and error write characters that their encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def lossy(stream: TextIO) -> TextIO:
    """Return the stream, as one whose writes never fail."""
    return cast(TextIO, _LossyOutput(stream))
