"""Libraries that transformers, peft and accelerate import wherever they are installed, though few runs need
them.

`datasets` brings pandas, and bitsandbytes brings torch's compiler: together a quarter of all imports here.
bitsandbytes also asks each GPU what it is, which a process that others are forked from must not do.
deepspeed, which accelerate imports when it unwraps a model, takes seconds, too, and brings MLflow where that
is installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HIDDEN = ("datasets", "bitsandbytes")
# what looks once whether bitsandbytes is installed, and remembers it
_ASKED_ONCE = (
    ("peft.import_utils", "is_bnb_available"),
    ("peft.import_utils", "is_bnb_4bit_available"),
    ("transformers.utils.import_utils", "is_bitsandbytes_available"),
)
_hides = False  # in this process, or in the one that it was forked from


@contextmanager
def hidden(*more: str) -> Iterator[None]:
    """Have libraries that are imported meanwhile find none of HIDDEN, and of more, installed. They remember
    it: transformers without torch reads configs and tokenizers, and nothing else in this process. accelerate
    finds DeepSpeed from then on only where a run that needs it has imported it."""
    global _hides
    _hides = True
    missing = [name for name in (*HIDDEN, *more) if name not in sys.modules]
    for name in missing:
        sys.modules[name] = None  # type: ignore[assignment]  # as documented for sys.modules: not to be imported
    try:
        yield
        if "bitsandbytes" in missing:
            for asked in _asked_once():
                asked()  # peft looks when it adds LoRA, and imports what it finds
        accelerate: Any = sys.modules.get("accelerate.utils.other")
        if accelerate:  # it asks of each model that it unwraps whether it is DeepSpeed's engine
            accelerate.is_deepspeed_available = lambda: "deepspeed" in sys.modules
    finally:
        for name in missing:
            del sys.modules[name]


def show_bitsandbytes() -> None:
    """Have transformers and peft look again whether bitsandbytes is installed, if it was hidden."""
    if _hides and "torch" in sys.modules:  # without torch neither is needed
        for asked in _asked_once():
            asked.cache_clear()


def _asked_once() -> list[Any]:
    return [getattr(sys.modules[module], name) for module, name in _ASKED_ONCE if module in sys.modules]
