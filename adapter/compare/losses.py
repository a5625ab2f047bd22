"""How likely a model finds given replies: the loss of training rows, the perplexity of answers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from qwenlora.adapter.answers import Question, prompt_of
from qwenlora.configs.schema import Data
from qwenlora.data.bad_row import BadRow
from qwenlora.data.chat import Encoder, Tokens
from qwenlora.data.overlength import cut_to_length
from qwenlora.data.rows import Row
from qwenlora.run.long_work import each
from qwenlora.trainer.loop.batches import WEIGHTS, collate
from qwenlora.trainer.loop.chunked_loss import summed_loss
from qwenlora.trainer.model.loading import IGNORED

TOKENS_AT_ONCE = 16384  # of a batch, padding included


def trained_tokens(tokenizer: Any, rows: Sequence[Row], data: Data) -> list[Tokens]:
    """Return rows as training sees them: masked, and cut or left out as data.overlength says."""
    encoder = Encoder(tokenizer, data.train_on)
    encoded: list[Tokens] = []
    for row, tokens in zip(rows, encoder.encode(list(rows)), strict=True):
        if isinstance(tokens, BadRow):
            continue
        if len(tokens.ids) <= data.max_length:
            encoded.append(tokens)
            continue
        with suppress(BadRow):
            encoded += cut_to_length(row, tokens, encoder, data).pieces
    return encoded


def answer_tokens(tokenizer: Any, questions: Sequence[Question], answers: Sequence[str]) -> list[Tokens]:
    """Return each question and answer as the model would have written them; only answers are trained on.

    The answer has no end of turn, since a long answer was cut. Empty answers are left out.
    """
    encoded = []
    for question, answer in zip(questions, answers, strict=True):
        prompt_ids, answer_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt_of(tokenizer, question), answer)
        )
        if answer_ids:
            ids = np.array([*prompt_ids, *answer_ids], np.int32)
            encoded.append(Tokens(ids, np.arange(len(ids)) >= len(prompt_ids)))
    return encoded


def mean_loss(
    model: Any, rows: Sequence[Tokens], pad_id: int, title: str, *, batch_size: int
) -> float | None:
    """Return the mean cross-entropy over all trained tokens, as evaluation computes it (weighted, where they
    have weights); None without any.

    Summed in float64 and divided once, so batches do not matter. Only trained tokens get logits.
    """
    # still with the adapter, which is inside the base's layers
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    total = count = 0.0
    batches = list(_batches(rows, batch_size))
    for rows_of_batch in each(batches, title):
        batch = {name: values.to(model.device) for name, values in collate(rows_of_batch, pad_id).items()}
        labels = batch.pop("labels")[:, 1:]
        trained = labels != IGNORED
        weights = (batch.pop(WEIGHTS)[:, :-1] if WEIGHTS in batch else trained.float())[trained]
        with torch.inference_mode():
            states = decoder(**batch, use_cache=False).last_hidden_state[:, :-1][trained]
            total += summed_loss(head, states, labels[trained], weights).item()
        count += weights.double().sum().item()
    return total / count if count else None


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss), at most exp(700) so that it is finite."""
    return None if loss is None else math.exp(min(loss, 700.0))


def _batches(rows: Sequence[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    """Yield rows of about the same length, longest first, as many as TOKENS_AT_ONCE and batch_size allow."""
    rest = sorted(rows, key=lambda row: -len(row.ids))
    while rest:
        size = max(1, min(batch_size, TOKENS_AT_ONCE // len(rest[0].ids)))
        yield rest[:size]
        rest = rest[size:]
