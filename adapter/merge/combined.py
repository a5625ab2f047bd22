"""Several adapters of a base, combined by peft: `qwenlora merge A OUT --adapter B --weights 0.7,0.3`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel

from qwenlora.adapter.adapter_file import read_adapter
from qwenlora.adapter.merge.streamed import StreamedModel
from qwenlora.adapter.subject import Subject
from qwenlora.adapter.tensors import tensor_of
from qwenlora.trainer.model.names import names_in, older_names
from qwenlora.trainer.model.targets import saved_settings

COMBINATIONS = get_args(get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
DENSITY = 0.5  # the share of an adapter's numbers that ties, dare and magnitude_prune keep
COMBINED = "combined"
BASE_COPY = ".base_layer.weight"  # the end of names of base matrices that LoRA is on
NOT_WEIGHTS = ("alora_invocation_tokens", "layer_replication")  # settings that merged weights cannot express
# values of init_lora_weights that change the base when the adapter is loaded
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def parse_weights(weights: str | None, count: int) -> list[float]:
    """Return the adapters' weights, by default 1 each. Raises: ValueError unless each has a finite number."""
    if weights is None:
        return [1.0] * count
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        raise ValueError(
            f"--weights {weights}: expected numbers with commas between them, as 0.7,0.3"
        ) from None
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"--weights {weights}: expected finite numbers, as 0.7,0.3")
    if len(numbers) != count:
        raise ValueError(
            f"--weights {weights} has {len(numbers)} numbers for {count} adapters; expected one for each"
        )
    return numbers


def check_combination(subjects: list[Subject], weights: list[float], combination: str) -> None:
    """Raise ValueError for adapters that cannot be merged, alone or together."""
    if combination not in COMBINATIONS:
        raise ValueError(f"--combine {combination} is unknown; peft has {', '.join(COMBINATIONS)}")
    for subject in subjects:
        config = PeftConfig.from_pretrained(str(subject.adapter))
        start = config.init_lora_weights
        if isinstance(start, str) and start.startswith(BASE_CHANGING_STARTS):
            raise ValueError(
                f"{subject.name} was begun with init_lora_weights={start}, which changes the base; save it"
                " with peft's path_initial_model_for_weight_conversion first"
            )
        if used := [key for key in NOT_WEIGHTS if getattr(config, key)]:
            raise ValueError(
                f"{subject.name} uses {used[0]}, which no merged weights can do; load it with peft"
            )
        if not _is_single(weights):
            _check_combinable(subject, subjects[0], config)


def _check_combinable(subject: Subject, first: Subject, config: Any) -> None:
    if subject.base != first.base:
        raise ValueError(
            f"{first.name} needs {first.base}, {subject.name} needs {subject.base}: adapters of different"
            " bases cannot be combined; if it is one model in two places, name it with --base"
        )
    keys = (
        "use_dora",
        "modules_to_save",
        "bias",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
    )
    used = [key for key in keys if getattr(config, key) and (key, getattr(config, key)) != ("bias", "none")]
    if used:
        raise ValueError(
            f"{subject.name} uses {', '.join(used)}, which peft cannot weigh or add; merge it alone"
        )


def _is_single(weights: list[float]) -> bool:
    """Whether there is a single adapter, with weight 1."""
    return weights == [1.0]


@contextmanager
def _room_for_copies(base: StreamedModel, subject: Subject) -> Iterator[None]:
    """Give memory to the base's matrices that an adapter brings, too: peft saves those that LoRA is on.

    Raises: ValueError when such a copy differs from the base's matrix.
    """
    assert subject.adapter
    held = names_in(base.base, read_adapter(subject.adapter)[1])
    copies = {name: tensor_of(values) for name, values in held.items() if name.endswith(BASE_COPY)}
    placeholders: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, values in copies.items():
        own_name = name.removeprefix("base_model.model.").replace(BASE_COPY, ".weight")
        parameter = base.base.get_parameter(own_name)
        placeholders.setdefault(parameter, parameter.data)  # tied names share a parameter
        parameter.data = torch.empty_like(values, dtype=parameter.dtype)
        if not torch.equal(values, base.value(own_name).to(values.dtype)):
            raise ValueError(
                f"{subject.name} brings {own_name}, and {subject.base} has another one: it was trained on"
                " another base; name that with --base"
            )
    yield
    for parameter, values in placeholders.items():
        parameter.data = values


def attach_adapters(
    base: StreamedModel, subjects: list[Subject], weights: list[float], combination: str
) -> PeftModel:
    """Return the base with its adapter, or several combined. Raises: ValueError when they do not fit."""
    names = [f"adapter_{number}" for number in range(len(subjects))]
    model: Any = None
    for name, subject in zip(names, subjects, strict=True):
        assert subject.adapter
        settings = saved_settings(base.base, subject.adapter)
        with _room_for_copies(base, subject):
            if model is None:
                model = PeftModel.from_pretrained(
                    base.base, subject.adapter, adapter_name=name, torch_device="cpu", config=settings
                )
            else:
                model.add_adapter(name, settings)
                model.load_adapter(
                    subject.adapter, adapter_name=name, torch_device="cpu", key_mapping=older_names(base.base)
                )
    _check_biases(model)
    if not _is_single(weights):
        _combine(model, names, weights, combination)
    return model


def _check_biases(model: Any) -> None:
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not any(layer.lora_bias.values()):
            continue
        if layer.get_base_layer().bias is None:
            raise ValueError(
                f"the adapter has a bias (lora_bias) for {path.removeprefix('base_model.model.')}, where the"
                " base has none to add it to; load it with peft"
            )


def _combine(model: Any, names: list[str], weights: list[float], combination: str) -> None:
    """Replace a model's adapters by their weighted combination."""
    torch.manual_seed(0)  # dare drops numbers at random
    try:
        model.base_model.add_weighted_adapter(
            names, weights, COMBINED, combination_type=combination, density=DENSITY, svd_full_matrices=False
        )
    except ValueError as error:  # different ranks or kinds of target_modules
        raise ValueError(
            f"--combine {combination}: {str(error).splitlines()[0]} try --combine cat or svd"
        ) from None
    model.set_adapter(COMBINED)
    for name in names:
        model.delete_adapter(name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and COMBINED in layer.scaling:
            # its numbers are scaled already; for rsLoRA peft would scale them again
            layer.scaling[COMBINED] = 1.0
