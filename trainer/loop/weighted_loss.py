"""The loss of rows whose tokens have weights: sum(weight * loss) / sum(weight) over a global batch.

Without weights the model computes its own loss, and nothing here is used. With them a batch has loss_weights,
float32 [rows, width], shifted as the model shifts labels: the weight at i is that of the token at i + 1. A
model hands all that it does not know to its loss function, which is replaced by one that knows them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from qwenlora.data.chat import Tokens
from qwenlora.trainer.model.base import IGNORED

WEIGHTS = "loss_weights"


def loss_weights(rows: list[list[Tokens]], width: int) -> dict[str, Tensor]:
    """Return a batch's loss_weights; empty when no row has weights. rows: one after the other in each line of
    the batch, width tokens."""
    if all(row.weights is None for line in rows for row in line):
        return {}
    weights = torch.zeros(len(rows), width)
    for number, line in enumerate(rows):
        given = torch.cat([torch.from_numpy(row.given_weights()) for row in line])
        weights[number, : len(given) - 1] = given[1:]
    return {WEIGHTS: weights}


def weight_of(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return the sum of batches' weights, a float64 scalar: of trained tokens where they have none."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        total += _weight_of(batch).to(device)
    return total


def _weight_of(batch: dict[str, Tensor]) -> Tensor:
    if WEIGHTS in batch:
        return batch[WEIGHTS].double().sum()
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != IGNORED).double().sum()


def use_weights(model: Any, *, accepts: bool) -> None:
    """Make a model weigh its loss by loss_weights where a batch has them. accepts: whether its loss is
    transformers' own for causal models. Raises: ValueError if not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not accepts:
        raise ValueError(
            f"the rows have weights, and {type(base).__name__} computes its loss by itself, without them; use"
            " weights 0 and 1 alone, or ignore their key in data.columns"
        )
    own = base.loss_function

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: int, *, loss_weights: Tensor | None = None, **options: Any
    ) -> Tensor:
        if loss_weights is None:
            of_all: Tensor = own(logits, labels, vocab_size, **options)
            return of_all
        shift_labels = options.get("shift_labels")
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        losses = cross_entropy(
            logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        number: Tensor | int = options["num_items_in_batch"]  # the weight of the global batch
        return (losses * loss_weights.flatten() / number).sum()

    base.loss_function = loss_function
