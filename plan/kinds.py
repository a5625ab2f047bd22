"""Kinds of layers (attention, experts, router ...) by their names, and which of them all-linear means."""

# by the part of a module's name that says it, in the order in which they are looked for
KINDS = {
    "lm_head": "head",
    "embed_tokens": "embeddings",
    "experts": "experts",
    "shared_expert_gate": "router",
    "shared_expert": "shared experts",
    "shared_experts": "shared experts",
    "linear_attn": "linear attention",
    "self_attn": "attention",
    "attn": "attention",
    "gate": "router",
    "mlp": "MLP",
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Return the kind of a module or parameter, by its dotted name in the base or under peft."""
    parts = set(name.split("."))
    return next((kind for part, kind in KINDS.items() if part in parts), OTHER)


NOT_LINEAR = ("head", "embeddings", "router")  # kinds that all-linear leaves out
LEFT_OUT = {"all": (), "shared": ("experts",), "none": ("experts", "shared experts")}  # by lora.experts
