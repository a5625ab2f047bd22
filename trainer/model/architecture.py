"""transformers' class of a base. A base in the layout of a vision model is loaded as the full class without
its vision part: what is trained is its text, and names are those that peft and vLLM look for (names.py)."""

from functools import cache
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from qwenlora.trainer.model.names import OLDER_NAMES, VISION, has_vision


class _FullClass:
    """What transformers' full classes get to be used like its text classes."""

    accepts_loss_kwargs = True  # what Trainer counts reaches their loss function, as in text classes
    _checkpoint_conversion_mapping = OLDER_NAMES  # by which peft renames what it loads

    @classmethod
    def from_config(cls: Any, config: Any, *, trust_remote_code: bool = False, **how: Any) -> Any:
        """Return a model with new weights, as AutoModelForCausalLM.from_config does."""
        return cls._from_config(config, **how)


class _TextPart(_FullClass):
    """A full class whose vision part is not loaded."""

    _keys_to_ignore_on_load_unexpected = [r"^mtp\.", rf"^(model\.)?{VISION}\."]  # noqa: RUF012 (a list there)

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        super().__init__(config, *inputs, **options)  # type: ignore[call-arg]
        own: Any = self
        delattr(own.model, VISION)
        own.model.language_model.register_forward_pre_hook(_as_of_text, with_kwargs=True)


def class_of(model_config: Any, *, vision: bool = False) -> Any:
    """Return what has from_pretrained and from_config for a base. model_config: transformers'; vision: with
    its vision part, if any."""
    if not has_vision(model_config):
        return AutoModelForCausalLM
    full = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(model_config)]
    return _made_of(full, _FullClass if vision else _TextPart)


def loader_of(model_config: Any) -> str:
    """Return the name of transformers' Auto class that loads all of a base."""
    kind = AutoModelForImageTextToText if has_vision(model_config) else AutoModelForCausalLM
    return str(kind.__name__)


@cache
def _made_of(full: type, added: type) -> type:
    # transformers knows a class by name and module: for the loss, and to convert names and weights
    return type(full.__name__, (added, full), {"__module__": full.__module__})


def _as_of_text(_: object, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the text model its positions four times. Qwen2.5-VL's looks for the begins of packed rows only in
    the first of four; the others are those in time, height and width, which are all the same for text."""
    positions = options.get("position_ids")
    if positions is not None and positions.ndim == 2:
        options = options | {"position_ids": positions.expand(4, *positions.shape)}
    return inputs, options
