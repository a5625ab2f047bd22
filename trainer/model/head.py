"""A head of its own in the files of a base whose config.json has it tied to the embeddings. transformers may
load such a head, and goes on calling it tied: here the files decide, for every strategy and command."""

from functools import cache
from typing import Any

import numpy as np

from qwenlora.trainer.model.headers import TensorValues, mapped, safetensors_of

NOTE = (
    "the base's config.json has embeddings and head tied, and its files hold a head of their own, which is"
    ' used; set "tie_word_embeddings": false there'
)
SLICE = 2**22  # numbers that are compared at a time
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


def is_tied(model_config: Any) -> bool:
    """Whether a transformers config has embeddings and head as one matrix."""
    return bool(getattr(model_config, "tie_word_embeddings", False))


@cache
def has_own_head(base: str, revision: str | None = None, *, download: bool = False) -> bool:
    """Whether a base's safetensors hold a head that differs from the embeddings. download: of a base from the
    hub; else only files in its cache are read. All of both is read where the files have both: few have."""
    places: dict[str, TensorValues] = {}
    for file in safetensors_of(base, revision, local=not download):
        places |= mapped(file)
    head = next((places[name] for name in places if name.endswith(HEAD)), None)
    embeddings = next((places[name] for name in places if name.endswith(EMBEDDINGS)), None)
    if head is None or embeddings is None:
        return False
    if head.raw.shape != embeddings.raw.shape:
        return True
    starts = range(0, head.raw.size, SLICE)
    return not all(
        np.array_equal(head.part(start, start + SLICE), embeddings.part(start, start + SLICE))
        for start in starts
    )


def untie(model_config: Any) -> None:
    """Make a transformers config say that embeddings and head are two matrices."""
    for part in (model_config, model_config.get_text_config()):
        part.tie_word_embeddings = False
