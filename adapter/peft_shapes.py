"""Whether an adapter has the names and shapes that peft makes on torch's meta device, from the base's
config.json. ordinary.py knows them without peft where nothing is unusual."""

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils import transformers_weight_conversion as conversion

from qwenlora.adapter.subject import ADAPTER_CONFIG, Subject
from qwenlora.run.format import and_more, shape
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.headers import TensorValues
from qwenlora.trainer.model.names import names_in
from qwenlora.trainer.model.pretrained import load_config_of
from qwenlora.trainer.model.targets import saved_settings

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_shapes(subject: Subject, file: Path, weights: Mapping[str, TensorValues]) -> str:
    """Return the base's architecture. Raises: ValueError unless peft makes the same names and shapes."""
    base = load_config_of(subject.config, subject.base)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = class_of(base, vision=True).from_config(
            base, trust_remote_code=subject.config.model.trust_remote_code
        )
        try:
            settings = saved_settings(model, file.parent)
            settings.init_lora_weights = True  # of numbers that are not there
            model = get_peft_model(model, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file.parent / ADAPTER_CONFIG} does not fit {subject.base}: {str(error).splitlines()[0]}"
            ) from None
        needed = get_peft_model_state_dict(model, save_embedding_layers=False)
        known = get_peft_model_state_dict(model, save_embedding_layers=True)
        shapes = _as_peft_loads(subject, model, weights)
    _check_names(subject, file, set(shapes), set(needed), set(known))
    for name in sorted(shapes):
        if shapes[name] != tuple(known[name].shape):
            raise ValueError(
                f"{file}: {name} is {shape(shapes[name])}, {subject.base} needs"
                f" {shape(known[name].shape)}; it was trained on another base: name that with --base"
            )
    return str((base.architectures or [type(model).__name__])[0])


def _as_peft_loads(
    subject: Subject, model: PeftModel, weights: Mapping[str, TensorValues]
) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of an adapter's tensors as peft would load them: those that have a module for each
    expert, as transformers 4 had them, become one for all. Raises: ValueError where it would lose them."""
    shapes = names_in(model, {name: tuple(values.raw.shape) for name, values in weights.items()})
    of_one = sorted(name for name in shapes if ONE_EXPERT.search(name))
    if not of_one or of_one[0] in get_peft_model_state_dict(model):  # a model whose experts are modules
        return shapes
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    with suppress(ValueError, RuntimeError, KeyError):  # of shapes or names that do not go together
        made = conversion.convert_peft_adapter_state_dict_for_transformers(
            model, model.peft_config["default"], tensors
        )
        if (
            not any(ONE_EXPERT.search(name) for name in made)
            and model.peft_config["default"].target_parameters
        ):
            return {name: tuple(tensor.shape) for name, tensor in made.items()}
    raise ValueError(
        f"{subject.name} has a module for each expert ({of_one[0]}), and {subject.base} has all experts of a"
        " layer in one, to which peft cannot convert them; merge it where it was trained, with transformers"
        " 4, or train it again"
    )


def _check_names(subject: Subject, file: Path, names: set[str], needed: set[str], known: set[str]) -> None:
    if missing := sorted(needed - names):
        raise ValueError(
            f"{file} lacks {missing[0]}{and_more(missing)}, which its {ADAPTER_CONFIG} and {subject.base}"
            " need"
        )
    if extra := sorted(name for name in (names - needed) & known if ".base_layer." not in name):
        raise ValueError(
            f"{file} has {extra[0]}{and_more(extra)} besides, a matrix of the base that peft would put in the"
            " place of the base's own; save the adapter without it (save_embedding_layers=False), or name it"
            " in modules_to_save"
        )
    if unknown := sorted(names - known):
        raise ValueError(f"{file} has {unknown[0]}{and_more(unknown)}, which {subject.base} has no place for")
