"""The gradients of a model with an adapter, and how far they are from others."""

from typing import Any

import torch
from torch import Tensor


def losses_and_gradients(
    model: Any, ids: Tensor, *, autocast: bool = False, **more: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and gradients by name: of the adapter, and of the input."""
    model.zero_grad()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(inputs_embeds=x, labels=ids, **more).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return loss.detach(), gradients | {"x": x.grad}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return how far gradients are from others, relative to these, by name."""
    return {
        name: ((g - other[name]).norm() / other[name].norm().clamp(min=1e-3)).item()
        for name, g in one.items()
    }
