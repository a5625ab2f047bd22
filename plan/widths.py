"""The widths of a token's activations in a model, in numbers: what memory is estimated by.

text_config: transformers' config of a model's text part, or anything that has its fields.
"""

from collections.abc import Iterable
from typing import Any, TypedDict

from qwenlora.plan.flops import attention_widths


class Widths(TypedDict):
    """As in run.records.Parameters."""

    hidden_size: int
    intermediate_size: int
    kv_width: int
    attention_width: int
    normed_width: int
    linear_width: int
    experts_width: int
    experts_met: int


def widths(text_config: Any, names: Iterable[str]) -> Widths:
    """Return a model's widths. names: of its modules or parameters."""
    heads, hidden = text_config.num_attention_heads, text_config.hidden_size
    keys = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    met = getattr(text_config, "num_experts_per_tok", None) or 0
    expert = met * (getattr(text_config, "moe_intermediate_size", None) or 0)
    attention = sum(attention_widths(text_config).values())
    has_norms = any("q_norm" in name.split(".") for name in names)
    shared = (getattr(text_config, "shared_expert_intermediate_size", None) or 0) if met else 0
    return Widths(
        hidden_size=hidden,
        intermediate_size=expert + shared if met else int(text_config.intermediate_size),
        kv_width=keys * head_dim,
        attention_width=attention,
        normed_width=attention * (heads + keys) // heads if has_norms else 0,
        linear_width=_linear(text_config),
        experts_width=met * hidden + expert,
        experts_met=met,
    )


def _linear(text_config: Any) -> int:
    layers = list(getattr(text_config, "layer_types", None) or ()).count("linear_attention")
    return layers and layers * text_config.linear_num_value_heads * text_config.linear_value_head_dim
