"""Modules that import torch, loaded when they are first used: --help and refusals come ten seconds sooner."""

import importlib
import sys
from typing import Any

from rich.console import Console

from qwenlora.adapter import quiet
from qwenlora.trainer.hidden import hidden


class Deferred:
    """Stands for a module until one of its attributes is used."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if self._module not in sys.modules:
            with quiet(), hidden(), Console(stderr=True).status("starting", spinner_style="dim"):
                importlib.import_module(self._module)
        return getattr(sys.modules[self._module], name)
