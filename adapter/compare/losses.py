"""How likely a model finds given replies: the loss of rows as they are trained, the perplexity of answers."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.progress import track
from torch.nn.functional import cross_entropy

from qwenlora.adapter.answers import Question, prompt_of
from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.overlength import cut_to_length
from qwenlora.data.rows import Row
from qwenlora.trainer.loop.batches import collate
from qwenlora.trainer.model.base import IGNORED

TOKENS_AT_ONCE = 16384  # of a batch, padding included
LOGITS_AT_ONCE = 1024  # tokens whose logits are held: 0.6 GB of float32 at Qwen's 152 thousand words


def trained_tokens(tokenizer: Any, rows: Sequence[Row], data: Data) -> list[Tokens]:
    """Return rows as training sees them: masked, and cut or left out as data.overlength says."""
    encoder = Encoder(tokenizer, data.train_on)
    found: list[Tokens] = []
    for row, tokens in zip(rows, encoder.encode(list(rows)), strict=True):
        if isinstance(tokens, BadRow):
            continue
        try:
            found += (
                [tokens]
                if len(tokens.ids) <= data.max_length
                else cut_to_length(row, tokens, encoder, data).pieces
            )
        except BadRow:
            continue
    return found


def answer_tokens(tokenizer: Any, questions: Sequence[Question], answers: Sequence[str]) -> list[Tokens]:
    """Return each question and answer as the model would have written it; the answer's tokens count, not its
    end.

    Not its end, since a long answer was cut. Empty answers are left out.
    """
    found = []
    for question, answer in zip(questions, answers, strict=True):
        asked, said = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt_of(tokenizer, question), answer)
        )
        if said:
            ids = np.array([*asked, *said], np.int32)
            found.append(Tokens(ids, np.arange(len(ids)) >= len(asked)))
    return found


def mean_loss(model: Any, rows: Sequence[Tokens], pad_id: int, what: str, *, batch_size: int) -> float | None:
    """Return the mean cross-entropy over all trained tokens, as evaluation has it; None when there are none.

    Summed in float64, divided once: batches do not matter. Logits are made for trained tokens alone, some at
    a time.
    what: beside the progress bar.
    """
    inner = (
        model.get_base_model() if isinstance(model, PeftModel) else model
    )  # adapters are inside its layers
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    total, count = 0.0, 0
    batches = list(_batches(rows, batch_size))
    for few in track(batches, description=what, transient=True, disable=not sys.stdout.isatty()):
        batch = {name: values.to(model.device) for name, values in collate(few, pad_id).items()}
        wanted = batch.pop("labels")[:, 1:]
        trained = wanted != IGNORED
        with torch.inference_mode():
            states = decoder(**batch, use_cache=False).last_hidden_state[:, :-1][trained]
            parts = zip(
                *(torch.split(each, LOGITS_AT_ONCE) for each in (states, wanted[trained])), strict=True
            )
            for some, targets in parts:
                total += cross_entropy(head(some).float(), targets, reduction="none").double().sum().item()
        count += int(trained.sum())
    return total / count if count else None


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), kept finite: of how many equally likely tokens each would be one."""
    return None if loss is None else math.exp(min(loss, 700.0))


def _batches(rows: Sequence[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    """Yield rows of about the same length, longest first, as many as TOKENS_AT_ONCE and batch_size allow."""
    left = sorted(rows, key=lambda row: -len(row.ids))
    while left:
        size = max(1, min(batch_size, TOKENS_AT_ONCE // len(left[0].ids)))
        yield left[:size]
        left = left[size:]
