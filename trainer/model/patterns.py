"""Checks of what lora.rank_pattern, alpha_pattern, exclude_modules and layers_to_transform name in a model:
peft ignores what names nothing."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from qwenlora.configs.schema import Lora
from qwenlora.plan.adapter import PATTERNS, check_expressions, is_chosen, is_excluded
from qwenlora.plan.kinds import kind_of
from qwenlora.run.format import and_more
from qwenlora.trainer.model.kinds import linear_layers, stacks

WEIGHT = ".weight"


def also_excluded(excluded: str | Collection[str] | None, expression: str) -> str:
    """Return exclude_modules as one regular expression that leaves out more. excluded: as peft has it."""
    if not excluded:
        return expression
    if not isinstance(excluded, str):
        excluded = rf"(.*\.)?({'|'.join(map(re.escape, sorted(excluded)))})"
    return f"{excluded}|{expression}"


def check_selection(model: Any, lora: Lora) -> None:
    """Refuse modules or layers to leave out that the model does not have, and what is no regular expression.
    Raises: ValueError."""
    layers = model.config.get_text_config().num_hidden_layers
    if beyond := [layer for layer in lora.layers_to_transform or () if layer >= layers]:
        raise ValueError(
            f"lora.layers_to_transform: the model has no layer {beyond[0]}; its last is {layers - 1}"
        )
    check_expressions(lora)
    excluded = lora.exclude_modules
    stacked = stacks(model)
    names = [*linear_layers(model), *stacked, *(name.rpartition(".")[0] for name in stacked)]
    for one in [excluded] if isinstance(excluded, str) else excluded or ():
        alone = one if isinstance(excluded, str) else [one]
        if not any(is_excluded(alone, name) for name in names):
            raise ValueError(
                f"lora.exclude_modules: the model has no linear layer {one}; a list has ends of names, as"
                " [o_proj], and a text is a regular expression for whole names, as .*layers.0[.].*"
            )


def check_patterns(lora: Lora, settings: LoraConfig, adapted: Collection[str]) -> None:
    """Refuse patterns that match no adapted module, or that peft would read otherwise in adapter_config.json.
    settings: as adapter_config.json will have them, with what peft itself added; adapted: names. Raises:
    ValueError."""
    by_weight = {
        name.removesuffix(WEIGHT) for name in settings.target_parameters or () if name.endswith(WEIGHT)
    }
    for key in PATTERNS:
        patterns: dict[str, int] = getattr(lora, key)
        every: dict[str, int] = getattr(settings, key)
        for pattern in patterns:
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                ends = sorted({name.rpartition(".")[2] for name in adapted})
                raise ValueError(
                    f"lora.{key}: {pattern} matches no module with LoRA; they end in {', '.join(ends)}"
                )
        for name in adapted:
            _check_same(lora, key, every, name, name)
            if kind_of(name) != "experts" and any(f".{name}".endswith(f".{end}") for end in by_weight):
                _check_same(lora, key, every, name, name + WEIGHT)


def _check_same(lora: Lora, key: str, patterns: dict[str, int], name: str, saved_as: str) -> None:
    """Refuse patterns that give a module another number now than when the adapter is loaded."""
    ours: dict[str, int] = getattr(lora, key)
    now, then = get_pattern_key(list(ours), name), get_pattern_key(sorted(patterns), saved_as)
    if now not in ours and then not in ours:
        return  # peft's own
    if ours.get(now) == patterns.get(then):
        return
    if then in patterns and patterns[then] != ours.get(then):
        raise ValueError(
            f"lora.{key}: {now} matches {name}, for which peft itself sets {then} where target_modules name"
            " the experts; name them in target_parameters, as [experts.gate_up_proj, experts.down_proj]"
        )
    if saved_as != name:
        raise ValueError(
            f"lora.{key}: peft will know {name} as {saved_as} when it loads the adapter; write"
            f" {now}(\\.weight)?"
        )
    raise ValueError(
        f"lora.{key}: both {now} and {then} match {name}, and adapter_config.json has patterns in"
        " alphabetical order, of which peft takes the first: write patterns of which one matches"
    )


def check_excluded(lora: Lora, adapted: Iterable[str]) -> None:
    """Refuse parameters that are to be left out: peft leaves modules out alone. Raises: ValueError."""
    if wrong := [name for name in adapted if not is_chosen(lora, name)]:
        raise ValueError(
            f"lora.exclude_modules and lora.layers_to_transform do not reach lora.target_parameters, here"
            f" {wrong[0]}{and_more(wrong)}; write there in full what is trained, as"
            " layers.0.mlp.experts.down_proj"
        )
