"""Checks of what lora.rank_pattern, alpha_pattern, exclude_modules and layers_to_transform name in a model: peft
ignores what names nothing."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from qwenlora.configs.schema import Lora
from qwenlora.run.format import and_more

WEIGHT = ".weight"


def is_chosen(lora: Lora, name: str) -> bool:
    """Whether neither exclude_modules nor layers_to_transform leave a module or parameter out."""
    found = re.search(r"\.(\d+)\.", name)
    layer = int(found.group(1)) if found else None
    layers = lora.layers_to_transform
    return (layers is None or layer in layers) and not is_excluded(lora, name)


def is_excluded(lora: Lora, name: str) -> bool:
    """Whether exclude_modules has a module, or the module that a parameter is of."""
    excluded = lora.exclude_modules or ()
    names = (name, name.rpartition(".")[0])
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, each) for each in names)
    return any(f".{each}".endswith(f".{one}") for one in excluded for each in names)


def check_selection(model: Any, lora: Lora) -> None:
    """Refuse modules or layers to leave out that the model does not have. Raises: ValueError."""
    layers = model.config.get_text_config().num_hidden_layers
    if beyond := [layer for layer in lora.layers_to_transform or () if layer >= layers]:
        raise ValueError(
            f"lora.layers_to_transform: the model has no layer {beyond[0]}; its last is {layers - 1}"
        )
    excluded = lora.exclude_modules
    for one in [excluded] if isinstance(excluded, str) else excluded or ():
        alone = lora.model_copy(update={"exclude_modules": one if isinstance(excluded, str) else [one]})
        _compiled("exclude_modules", one)
        if not any(is_excluded(alone, name) for name, _ in model.named_modules()):
            raise ValueError(
                f"lora.exclude_modules: the model has no {one}; a list has ends of names, as [o_proj], and a text"
                " is a regular expression for whole names, as .*layers\\.0\\..*"
            )


def check_patterns(lora: Lora, settings: LoraConfig, adapted: Collection[str]) -> None:
    """Refuse patterns that match no adapted module, or that peft would read otherwise in adapter_config.json.
    settings: as adapter_config.json will have them; adapted: names. Raises: ValueError."""
    by_weight = {
        name.removesuffix(WEIGHT) for name in settings.target_parameters or () if name.endswith(WEIGHT)
    }
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, int] = getattr(lora, key)
        for pattern in patterns:
            _compiled(key, pattern)
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                ends = sorted({name.rpartition(".")[2] for name in adapted})
                raise ValueError(
                    f"lora.{key}: {pattern} matches no module with LoRA; they end in {', '.join(ends)}"
                )
        for name in adapted:
            _check_same(key, patterns, name, sorted(patterns), name)
            if any(f".{name}".endswith(f".{end}") for end in by_weight):
                _check_same(key, patterns, name, sorted(patterns), name + WEIGHT)


def _check_same(key: str, patterns: dict[str, int], name: str, later: Iterable[str], saved_as: str) -> None:
    now, then = get_pattern_key(list(patterns), name), get_pattern_key(list(later), saved_as)
    if patterns.get(now) == patterns.get(then):
        return
    if saved_as != name:
        raise ValueError(
            f"lora.{key}: peft will know {name} as {saved_as} when it loads the adapter; write {now}(\\.weight)?"
        )
    raise ValueError(
        f"lora.{key}: both {now} and {then} match {name}, and adapter_config.json has patterns in alphabetical"
        " order, of which peft takes the first: write patterns of which one matches"
    )


def check_excluded(lora: Lora, adapted: Iterable[str]) -> None:
    """Refuse parameters of modules that are to be left out: peft leaves no parameter out. Raises: ValueError."""
    if wrong := [name for name in adapted if not is_chosen(lora, name)]:
        raise ValueError(
            f"lora.exclude_modules and lora.layers_to_transform do not reach lora.target_parameters, here"
            f" {wrong[0]}{and_more(wrong)}; write there in full what is trained, as layers.0.mlp.experts.down_proj"
        )


def _compiled(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lora.{key}: {pattern} is no regular expression: {error}") from None
