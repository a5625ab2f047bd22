"""Libraries that transformers and peft import wherever they are installed, though few runs need them.

`datasets` brings pandas, and bitsandbytes brings torch's compiler: together a quarter of all imports here.
bitsandbytes also asks each GPU what it is, which a process that others are forked from must not do.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN = ("datasets", "bitsandbytes")
_hides = False  # in this process, or in the one that it was forked from


@contextmanager
def hidden(*more: str) -> Iterator[None]:
    """Have libraries that are imported meanwhile find none of HIDDEN, and of more, installed. They remember
    it: transformers without torch reads configs and tokenizers, and nothing else in this process."""
    global _hides
    _hides = True
    missing = [name for name in (*HIDDEN, *more) if name not in sys.modules]
    for name in missing:
        sys.modules[name] = None  # type: ignore[assignment]  # as documented for sys.modules: not to be imported
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def show_bitsandbytes() -> None:
    """Have transformers and peft look again whether bitsandbytes is installed, if it was hidden."""
    if not _hides or "torch" not in sys.modules:  # without torch neither is needed
        return
    from peft import import_utils as of_peft
    from transformers.utils import import_utils as of_transformers

    for found in (
        of_peft.is_bnb_available,
        of_peft.is_bnb_4bit_available,
        of_transformers.is_bitsandbytes_available,
    ):
        found.cache_clear()
