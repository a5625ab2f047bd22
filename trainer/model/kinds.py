"""The kinds of layers that a base has, and how much of each an adapter trains."""

from collections import Counter

from torch import nn

from qwenlora.plan.kinds import kind_of
from qwenlora.run.records import OfKind


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of a model's linear layers, the head included."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def stacks(model: nn.Module) -> list[str]:
    """Return the names of the parameters that hold a matrix of each expert; [] where there are none."""
    linear = {f"{name}.weight" for name in linear_layers(model)}
    named = [name for name, _ in model.named_parameters() if kind_of(name) == "experts"]
    return [name for name in named if name not in linear and not name.endswith("bias")]


def count_kinds(base: nn.Module) -> dict[str, OfKind]:
    """Return {kind: its numbers} of a base that has no adapter yet."""
    totals: Counter[str] = Counter()
    for name, parameter in base.named_parameters():
        totals[kind_of(name)] += parameter.numel()
    matrices = Counter(kind_of(name) for name in (*linear_layers(base), *stacks(base)))
    return {kind: OfKind(total=totals[kind], matrices=matrices[kind]) for kind in totals | matrices}


def count_trained(model: nn.Module, kinds: dict[str, OfKind]) -> dict[str, OfKind]:
    """Return the kinds of a base with what its adapter trains. model: peft's; kinds: of its base."""
    trained: Counter[str] = Counter()
    adapted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = kind_of(name)
            trained[kind] += parameter.numel()
            is_a = "lora_A" in name or "lora_embedding_A" in name
            adapted[kind] += is_a or ("modules_to_save" in name and parameter.ndim > 1)
    return {
        kind: of.model_copy(update={"trained": trained[kind], "adapted": adapted[kind]})
        for kind, of in kinds.items()
    }
