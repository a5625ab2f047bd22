"""Several adapters of one base, made one by peft: for `qwenlora merge A OUT --adapter B --weights
0.7,0.3`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel

from qwenlora.adapter import verify
from qwenlora.adapter.merge.streamed import Streamed
from qwenlora.adapter.subject import Subject

WAYS = get_args(get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
DENSITY = 0.5  # the share of an adapter's numbers that ties, dare and magnitude_prune keep
COMBINED = "combined"
COPY = ".base_layer.weight"  # ends the names of a base's matrices that LoRA is on
UNMERGED = ("alora_invocation_tokens", "layer_replication")  # these are more than other weights
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # these change the base as they are loaded


def shares_of(weights: str | None, count: int) -> list[float]:
    """Return the adapters' weights, 1 each by default. Raises: ValueError when they are not one number for
    each."""
    if weights is None:
        return [1.0] * count
    try:
        shares = [float(part) for part in weights.split(",")]
    except ValueError:
        raise ValueError(
            f"--weights {weights}: expected numbers with commas between them, as 0.7,0.3"
        ) from None
    if not all(math.isfinite(share) for share in shares):
        raise ValueError(f"--weights {weights}: expected finite numbers, as 0.7,0.3")
    if len(shares) != count:
        raise ValueError(
            f"--weights {weights} has {len(shares)} numbers for {count} adapters; expected one for each"
        )
    return shares


def check(subjects: list[Subject], shares: list[float], combine: str) -> None:
    """Raise ValueError for adapters that cannot be merged, or not together."""
    if combine not in WAYS:
        raise ValueError(f"--combine {combine} is unknown; peft has {', '.join(WAYS)}")
    for subject in subjects:
        found = PeftConfig.from_pretrained(str(subject.adapter))
        start = found.init_lora_weights
        if isinstance(start, str) and start.startswith(STARTS):
            raise ValueError(
                f"{subject.named} was begun with init_lora_weights={start}, which changes the base; save it"
                " with peft's path_initial_model_for_weight_conversion first"
            )
        if uses := [name for name in UNMERGED if getattr(found, name)]:
            raise ValueError(
                f"{subject.named} uses {uses[0]}, which no merged weights can do; load it with peft"
            )
        if _alone(shares):
            return
        if subject.base != subjects[0].base:
            raise ValueError(
                f"{subjects[0].named} needs {subjects[0].base}, {subject.named} needs {subject.base}:"
                " adapters of different bases cannot be combined; if it is one model in two places, name it"
                " with --base"
            )
        whole = {
            "use_dora": found.use_dora,
            "modules_to_save": found.modules_to_save,
            "bias": found.bias != "none",
            "lora_bias": found.lora_bias,
            "trainable_token_indices": found.trainable_token_indices,
            "target_parameters": found.target_parameters,
        }
        if uses := [name for name, used in whole.items() if used]:
            raise ValueError(
                f"{subject.named} uses {', '.join(uses)}, which peft cannot weigh or add; merge it alone"
            )


def _alone(shares: list[float]) -> bool:
    return shares == [1.0]


@contextmanager
def _room_for_copies(base: Streamed, subject: Subject) -> Iterator[None]:
    """Give memory to those of the base's matrices that an adapter has, too: with LoRA on them peft saves
    copies.

    Raises: ValueError when such a copy is not the base's.
    """
    assert subject.adapter
    _, weights = verify.read(subject.adapter)
    copies = {name: values for name, values in weights.items() if name.endswith(COPY)}
    hollow: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, values in copies.items():
        own = name.removeprefix("base_model.model.").replace(COPY, ".weight")
        parameter = base.base.get_parameter(own)
        hollow.setdefault(parameter, parameter.data)  # tied ones are one
        parameter.data = torch.empty_like(values, dtype=parameter.dtype)
        if not torch.equal(values, base.value(own).to(values.dtype)):
            raise ValueError(
                f"{subject.named} brings {own}, and {subject.base} has another one: it was trained on another"
                " base; name that with --base"
            )
    yield
    for parameter, values in hollow.items():
        parameter.data = values


def adapted(base: Streamed, subjects: list[Subject], shares: list[float], combine: str) -> PeftModel:
    """Return the base with the one adapter on it, or with what peft makes of several.

    Raises: ValueError when peft cannot combine them, or when an adapter brings other matrices of the base.
    """
    names = [f"adapter_{number}" for number in range(len(subjects))]
    model: Any = None
    for name, subject in zip(names, subjects, strict=True):
        with _room_for_copies(base, subject):
            if model is None:
                model = PeftModel.from_pretrained(
                    base.base, subject.adapter, adapter_name=name, torch_device="cpu"
                )
            else:
                model.load_adapter(subject.adapter, adapter_name=name, torch_device="cpu")
    for path, layer in model.named_modules():
        if (
            isinstance(layer, LoraLayer)
            and any(layer.lora_bias.values())
            and layer.get_base_layer().bias is None
        ):
            raise ValueError(
                f"the adapter has a bias (lora_bias) for {path.removeprefix('base_model.model.')}, where the"
                " base has none to add it to; load it with peft"
            )
    if _alone(shares):
        return model
    torch.manual_seed(0)  # dare drops numbers at random
    try:
        model.base_model.add_weighted_adapter(
            names, shares, COMBINED, combination_type=combine, density=DENSITY, svd_full_matrices=False
        )
    except ValueError as error:  # other ranks, other kinds of target_modules
        raise ValueError(
            f"--combine {combine}: {str(error).splitlines()[0]} try --combine cat or svd"
        ) from None
    model.set_adapter(COMBINED)
    for name in names:
        model.delete_adapter(name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and COMBINED in layer.scaling:
            layer.scaling[COMBINED] = (
                1.0  # the scales are in its numbers; of rsLoRA peft would apply another one
            )
    return model
