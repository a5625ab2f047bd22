"""A head of its own in the files of a base whose config.json has it tied to the embeddings. transformers may
load such a head, and goes on calling it tied: here the files decide, for every strategy and command."""

import math
from functools import cache
from typing import Any

import torch

from qwenlora.trainer.model.base_files import SLICE, BaseFiles

NOTE = (
    "the base's config.json has embeddings and head tied, and its files hold a head of their own, which is"
    ' used; set "tie_word_embeddings": false there'
)
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


def is_tied(model_config: Any) -> bool:
    """Whether a transformers config has embeddings and head as one matrix."""
    return bool(getattr(model_config, "tie_word_embeddings", False))


@cache
def has_own_head(base: str, revision: str | None = None, *, download: bool = False) -> bool:
    """Whether a base's safetensors hold a head that differs from the embeddings. download: of a base from the
    hub; else only files in its cache are read. All of both is read where the files have both: few have."""
    with BaseFiles(base, revision, local=not download) as files:
        head = next((name for name in files.places if name.endswith(HEAD)), None)
        embeddings = next((name for name in files.places if name.endswith(EMBEDDINGS)), None)
        if head is None or embeddings is None:
            return False
        shape = files.places[head].shape
        if shape != files.places[embeddings].shape:
            return True
        count = math.prod(shape)
        for start in range(0, count, SLICE):
            stop = min(start + SLICE, count)
            if not torch.equal(files.read(head, start, stop), files.read(embeddings, start, stop)):
                return True
    return False


def untie(model_config: Any) -> None:
    """Make a transformers config say that embeddings and head are two matrices."""
    for part in (model_config, model_config.get_text_config()):
        part.tie_word_embeddings = False
