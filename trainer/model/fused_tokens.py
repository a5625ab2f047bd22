"""Rows of embeddings and head that are trained for a few tokens (lora.trainable_token_indices).

peft puts the trained rows into a copy of the whole matrix in each forward pass, whose gradient is as large:
for a 7B a gigabyte each. Here the base's own module computes, and the rows of these tokens are put into what
it returns.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from qwenlora.trainer.model.fused_lora import ADAPTER


def fuse_tokens(model: Any) -> int:
    """Compute the trained rows of a peft model so; return of how many matrices."""
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        tokens = torch.tensor(layer.token_indices[ADAPTER], device=weight.device)
        places = torch.full([len(weight)], -1, device=weight.device)
        places[tokens] = torch.arange(len(tokens), device=weight.device)
        layer.tokens_and_places = (tokens, places)
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    if args or options or layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        plain: Tensor = type(layer).forward(layer, x, *args, **options)
        return plain
    output: Tensor = layer.base_layer(x)
    rows = layer.trainable_tokens_delta[ADAPTER].to(output.dtype)
    tokens, places = layer.tokens_and_places
    if isinstance(layer.base_layer, nn.Linear):  # the head: these tokens' logits
        return output.index_copy(-1, tokens, nn.functional.linear(x.to(output.dtype), rows))
    found = places[x]
    trained = nn.functional.embedding(found.clamp(min=0), rows)
    return torch.where((found >= 0).unsqueeze(-1), trained, output)
