"""Modules that import torch, loaded when they are first used: --help and refusals come ten seconds sooner."""

import contextlib
import importlib
import io
import logging
import sys
import warnings
from typing import Any

from rich.console import Console

from qwenlora.trainer.hidden import hidden


class Deferred:
    """Stands for a module until one of its attributes is used. quietly: a command loads it, and silences
    libraries from then on; a function leaves them as they are. without: what to hide from transformers."""

    def __init__(self, module: str, *, quietly: bool = True, without: tuple[str, ...] = ()) -> None:
        self._module, self._quietly, self._without = module, quietly, without

    def __getattr__(self, name: str) -> Any:
        if self._module not in sys.modules:
            silence = _quiet() if self._quietly else contextlib.redirect_stdout(io.StringIO())
            with (
                silence,
                hidden(*self._without),
                Console(stderr=True).status("starting", spinner_style="dim"),
            ):
                importlib.import_module(self._module)
        return getattr(sys.modules[self._module], name)


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Silence libraries' warnings from now on, and inside the block their output on import, too."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return contextlib.redirect_stdout(io.StringIO())
