"""The floating-point operations (FLOPs) of training, by the shape of the model and the lengths of rows.

Only useful ones count. Padding, masked positions, experts that a token does not meet, and activations that
gradient checkpointing computes again do not. So more MFU always means more tokens a second.

text_config: transformers' config of a model's text part, or anything that has its fields.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenlora.run.records import Work

FULL, SLIDING = "full_attention", "sliding_attention"
COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def flops(work: Work, lengths: NDArray[np.int64], trained: int) -> float:
    """Return the FLOPs of training rows once, forward and backward.

    lengths: of the rows, in tokens; trained: how many of the tokens are trained, for which alone the head is
    needed. A matrix product costs a token 2 FLOPs a number forward, 2 backward to the inputs, and 2 to a
    trained matrix. That the lowest layer's inputs need no gradient is neglected.
    """
    tokens = int(lengths.sum())
    products = tokens * (4 * work.frozen + 6 * work.trained)
    products += trained * (4 * work.head_frozen + 6 * work.head_trained)
    # a query and a key: 2 FLOPs a number for their product, 2 for the value's share; twice that backward
    pairs = sum(width * _pairs(lengths, window) for window, width in work.attention.items())
    return float(products + 3 * (4 * pairs + tokens * work.recurrence))


def share_of_experts(text_config: Any) -> float:
    """Return the share of a layer's routed experts that a token meets."""
    counts = (getattr(text_config, name, None) for name in COUNTS_OF_EXPERTS)
    experts = next((count for count in counts if count), None)
    return text_config.num_experts_per_tok / experts if experts else 1.0


def attention_widths(text_config: Any) -> dict[int, int]:
    """Return {window in tokens, 0 for none: heads * head_dim, summed over the layers that have it}."""
    heads = text_config.num_attention_heads
    width = heads * (getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
    window = getattr(text_config, "sliding_window", None) or 0
    alike = [SLIDING if window else FULL] * text_config.num_hidden_layers
    kinds = getattr(text_config, "layer_types", None) or alike
    widths: dict[int, int] = {}
    for kind in kinds:
        if kind in (FULL, SLIDING):
            seen = window if kind == SLIDING else 0
            widths[seen] = widths.get(seen, 0) + width
    return widths


def recurrence(text_config: Any) -> int:
    """Return the FLOPs, forward and for a token, of all gated delta nets: each head's state, key width x
    value width, is read by the key, updated, and read by the query. Source: arXiv 2412.06464, eq. 10."""
    layers = list(getattr(text_config, "layer_types", None) or ()).count("linear_attention")
    if not layers:
        return 0
    state = text_config.linear_key_head_dim * text_config.linear_value_head_dim
    return int(6 * layers * text_config.linear_num_value_heads * state)


def _pairs(lengths: NDArray[np.int64], window: int) -> int:
    """Return how many (query, key) pairs causal attention has in rows. window: keys that a query sees; 0: all
    before it, and itself."""
    seen = np.minimum(lengths, window) if window else lengths
    return int((lengths * seen - seen * (seen - 1) // 2).sum())
