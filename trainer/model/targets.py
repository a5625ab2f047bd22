"""What `lora.target_modules: all-linear` means on a mixture of experts: the same for each family.

peft rewrites all-linear by model type: for some mixtures it becomes the experts and the router without the
shared experts, for others the other way round. So it gets names from here. For the same mixtures it takes
gate_proj, up_proj and down_proj for names of the experts, as they were in transformers 4, whatever else is
called so. A shared expert or a dense MLP is named to it by its parameter then, as
shared_expert.gate_proj.weight, which makes tensors of the same names and shapes; as_named() trains it as the
linear layer that it is.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import transformers_weight_conversion as conversion
from torch import nn

from qwenlora.configs.schema import ALL_LINEAR, Lora
from qwenlora.plan.adapter import PATTERNS, is_chosen
from qwenlora.plan.kinds import LEFT_OUT, NOT_LINEAR, kind_of
from qwenlora.trainer.model.files import peft_s_own
from qwenlora.trainer.model.kinds import linear_layers, stacks
from qwenlora.trainer.model.names import has_vision, names_in


def resolve(model: Any, lora: Lora, settings: LoraConfig, saved: Path | None) -> None:
    """Put the names that all-linear means into peft's settings; on models without experts peft knows them.
    saved: the checkpoint that the run goes on from; what it, or else lora.init_from, trains is trained.
    Raises: ValueError when that is not what the config says, or when there is nothing to name."""
    stacked = stacks(model)
    if not stacked:
        modules = _modules(model, ())
        # peft wants names then, or would write them in full
        if lora.layers_to_transform is not None or has_vision(model.config):
            settings.target_modules = modules
        return
    if like := saved or (Path(lora.init_from).expanduser() if lora.init_from else None):
        theirs = saved_settings(model, like)
        _check_like(model, lora, theirs, like, experts=not saved)
        settings.target_modules, settings.target_parameters = theirs.target_modules, theirs.target_parameters
        for key in PATTERNS:
            both = peft_s_own(vars(theirs), lora, key) | getattr(lora, key)
            setattr(settings, key, dict(sorted(both.items())))  # as adapter_config.json has them
        return
    modules = _modules(model, LEFT_OUT[lora.experts])
    misread = taken_for_experts(model, modules)
    named_by_weight = {f"{name}.weight" for name in misread}
    settings.target_modules = modules - misread
    parameters = {_end(name, 3) for name in stacked} if lora.experts == "all" else set()
    parameters = _chosen(model, lora, parameters | named_by_weight | set(lora.target_parameters or ()))
    settings.target_parameters = sorted(parameters) or None


def saved_settings(model: Any, folder: Path) -> Any:
    """Return an adapter's settings; where they name modules or parameters in full, by a model's names."""
    settings: Any = PeftConfig.from_pretrained(str(folder))
    for key in ("target_modules", "target_parameters"):
        if (names := getattr(settings, key)) and not isinstance(names, str):
            setattr(settings, key, type(names)(names_in(model, dict.fromkeys(names))))
    return settings


def _chosen(model: nn.Module, lora: Lora, parameters: set[str]) -> set[str]:
    """Return names of parameters without what the config leaves out, which peft does only for modules."""
    full = _reached(model, parameters)
    chosen = {name for name in full if is_chosen(lora, name)}
    return parameters if chosen == full else chosen


def _reached(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the parameters of which a name, or its end, is given."""
    ends = tuple(f".{name}" for name in names)
    return {name for name, _ in model.named_parameters() if f".{name}".endswith(ends)}


def _modules(model: nn.Module, left_out: tuple[str, ...]) -> set[str]:
    """Return the linear layers to train, by ends of names that no other linear layer has. Raises: ValueError
    when some are not torch's."""
    not_wanted = (*NOT_LINEAR, *left_out)
    wanted, others = _by_kind(linear_layers(model), not_wanted)
    # of all classes
    linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    unknown = [name for name in _by_kind(linear, not_wanted)[0] if name not in wanted]
    if unknown or not wanted:
        which = f"{unknown[0]} is not one" if unknown else "it has none"
        raise ValueError(
            f"lora.target_modules={ALL_LINEAR} trains linear layers of torch's, and of the base {which}, as"
            " where GPTQ or AWQ quantised layers; name the layers, as [q_proj, v_proj]"
        )
    ends = {_end(name, parts) for name in others for parts in (1, 2)}
    return {next(e for e in (_end(name, 1), _end(name, 2), name) if e not in ends) for name in wanted}


def _by_kind(names: list[str], not_wanted: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names of layers of wanted kinds, and the others."""
    wanted = [name for name in names if kind_of(name) not in not_wanted]
    return wanted, [name for name in names if name not in wanted]


def _check_like(model: nn.Module, lora: Lora, theirs: LoraConfig, like: Path, *, experts: bool) -> None:
    """Refuse to go on from an adapter without what lora.target_parameters names, or, if experts, with other
    experts than the config's. like: its folder. Raises: ValueError."""
    theirs = deepcopy(theirs)
    conversion.convert_peft_config_for_transformers(theirs, model=model, conversions=None)
    modules = theirs.target_modules if isinstance(theirs.target_modules, set) else set()
    reached = _reached(model, {*(theirs.target_parameters or ()), *(f"{name}.weight" for name in modules)})
    named = {name for name in _reached(model, lora.target_parameters or ()) if is_chosen(lora, name)}
    if lacking := sorted(named - reached):
        raise ValueError(
            f"lora.target_parameters={lora.target_parameters}: {like} has no LoRA on {lacking[0]}; leave it"
            " out, or begin a new adapter"
        )
    has = not reached.isdisjoint(stacks(model))
    if experts and has != (lora.experts == "all"):
        raise ValueError(
            f"lora.init_from={lora.init_from} has {'' if has else 'no '}LoRA on the experts, the config says"
            f" lora.experts={lora.experts}; set lora.experts: {'all' if has else 'shared'}"
        )


def taken_for_experts(model: nn.Module, modules: set[str]) -> set[str]:
    """Return those of the names that peft would take for the experts' matrices."""
    both = {"gate_proj", "up_proj"}  # which it refuses one by one
    probe = LoraConfig(target_modules=modules | both)
    conversion.convert_peft_config_for_transformers(probe, model=model, conversions=None)
    return modules - set(probe.target_modules or ())


@contextmanager
def as_named(model: nn.Module, settings: LoraConfig) -> Iterator[LoraConfig]:
    """Yield settings with which peft puts LoRA on the linear layers that resolve() named by parameter, which
    are trained, quantised and fused like others. Within, peft takes no name for an expert's."""
    named = layers_named_by_weight(model, settings)
    if not named:
        yield settings
        return
    if settings.lora_dropout or settings.use_dora:
        what = "lora_dropout != 0" if settings.lora_dropout else "use_dora"
        raise ValueError(
            f"lora.ParamWrapper, as which peft would load the adapter, does not work with {what}"
        )
    names = copy(settings)
    names.target_modules = set(settings.target_modules or ()) | named
    weights = {f"{name}.weight" for name in named}
    names.target_parameters = sorted(set(settings.target_parameters or ()) - weights)
    theirs = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = _leave_as_it_is
    try:
        yield names
    finally:
        conversion.convert_peft_config_for_transformers = theirs


def layers_named_by_weight(model: nn.Module, settings: LoraConfig) -> set[str]:
    """Return the ends of names of linear layers that are named as resolve() does."""
    modules = settings.target_modules or set()
    if isinstance(modules, str) or taken_for_experts(model, set(modules)):
        return set()  # such names mean experts to peft
    suffix = ".weight"
    layers = tuple(f".{name}" for name in linear_layers(model))
    ends = {name.removesuffix(suffix) for name in settings.target_parameters or () if name.endswith(suffix)}
    return taken_for_experts(model, {end for end in ends if any(one.endswith(f".{end}") for one in layers)})


def _leave_as_it_is(*_: object, **__: object) -> None:
    return None


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])
