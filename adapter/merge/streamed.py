"""A model whose weights stay in their files: one decoder layer or embedding at a time is in memory.

It computes logits in float32 on the CPU, and yields the parameters that an adapter changes, merged by peft.
transformers' own conversion makes parameters of the files' tensors (all experts are one parameter).
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qwenlora.adapter.weight_files import WeightFiles, read_tensor
from qwenlora.run.long_work import LongWork
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.spread.sharded_loading import weights_of

BOUND = 1e-4  # of logits, times their standard deviation if above 1: float32 itself may cause as much
ROUNDINGS = 4  # a difference up to so many times that of one more rounding of the weights counts as rounding
KEPT = 8  # last tokens of each prompt whose logits are compared: those of all tokens would not fit
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Slot(NamedTuple):
    """A module's weight. placeholder: a NaN of its shape, in its place while the weight is not in memory."""

    attribute: str
    parameter: str
    placeholder: nn.Parameter


class StreamedModel:
    """A causal language model over open files. Raises: ValueError when they lack a parameter.

    vision: with its vision part, if any. base: transformers' model without weights; model: the same with the
    adapter, after attach(); given: parameters of the base that the adapter itself brings; tied: the names of
    the parameter that has several.
    """

    def __init__(
        self, config: Any, files: WeightFiles, *, trust_remote_code: bool = False, vision: bool = False
    ) -> None:
        with init_empty_weights(include_buffers=False):
            self.base: Any = class_of(config, vision=vision).from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        self.base.tie_weights()
        self.base.requires_grad_(False).eval()
        self.model: Any = self.base
        self.files = files
        self.given: dict[str, Tensor] = {}
        self._layers = set(self.base._no_split_modules or ())
        self._sources: dict[str, list[tuple[str, str]]] = {}
        self._converters: dict[str, WeightConverter] = {}
        self._match_files()
        self._slots: dict[nn.Module, list[Slot]] = {}
        self.tied: list[str] = []
        self._put_placeholders()
        # conversions ask for a parameter's shape by its name, which peft's layers change
        self.base.get_parameter = dict(self.base.named_parameters(remove_duplicate=False)).__getitem__
        for name, buffer in self.base.named_buffers():
            if name in self._sources:
                buffer.copy_(self.value(name))

    def _put_placeholders(self) -> None:
        """Put a placeholder where each weight will be, and remember these slots."""
        paths = {module: path for path, module in self.base.named_modules()}
        for weight in weights_of(self.base):
            if len(weight.names) > 1:
                self.tied = weight.names
            made_of = next((name for name in weight.names if name in self._sources), None)
            if made_of is None:
                raise ValueError(
                    f"the base's files lack {weight.names[0]}; download it again, or name a whole one with"
                    " --base"
                )
            # vectors take real memory, since an adapter may write a bias into them
            shape, nan = weight.parameter.shape, torch.tensor(float("nan"))
            values = nan.repeat(shape) if len(shape) == 1 else nan.expand(shape)
            placeholder = weight.substitute(nn.Parameter(values, requires_grad=False))
            for module, attribute in weight.holders:
                own = f"{paths[module]}.{attribute}".lstrip(".")
                slot = Slot(attribute, own if own in self._sources else made_of, placeholder)
                self._slots.setdefault(module, []).append(slot)

    def _match_files(self) -> None:
        """Find the tensors that each parameter is made of, as transformers' from_pretrained does."""
        conversions = get_model_conversion_mapping(self.base)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        parameters = self.base.state_dict()
        for name in sorted(self.files.places, key=dot_natural_key):
            prefix = self.base.base_model_prefix
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if parameter not in parameters and name in parameters:
                parameter, pattern = name, None
            if parameter in parameters:
                self._sources.setdefault(parameter, []).append((pattern or "", name))
        self.base._weight_conversions = [entry for entry in conversions if entry.was_used()]  # the way back

    def names(self, parameter: str) -> list[str]:
        """Return the names in the files of a parameter's tensors; [] when it is tied to another."""
        return [name for _, name in self._sources.get(parameter, ())]

    def value(self, parameter: str) -> Tensor:
        """Return a base's parameter in its files' dtype; if they lack it, its tied partner."""
        sources = next(self._sources[name] for name in (parameter, *self.tied) if name in self._sources)
        if not sources[0][0]:
            return read_tensor(self.files, sources[0][1])
        conversion = deepcopy(self._converters[sources[0][0]])
        for pattern, name in sources:
            conversion.add_tensor(parameter, name, pattern, read_tensor(self.files, name))
        values = conversion.convert(parameter, model=self.base, config=self.base.config)[parameter]
        return cast("Tensor", values[0] if isinstance(values, list) else values)

    def as_filed(self, parameter: str, values: Tensor) -> dict[str, Tensor]:
        """Return a parameter as {name: tensor}, as the files have it, or would have it."""
        sources = self._sources.get(parameter)
        if sources and not sources[0][0]:
            return {sources[0][1]: values}
        filed: dict[str, Tensor] = revert_weight_conversion(self.base, {parameter: values})
        return {name: self._turned(name, tensor) for name, tensor in filed.items()}

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        """Return experts the way round that the files have them: transformers does not turn those of
        Qwen3-VL's mixtures back."""
        place = self.files.places.get(name)
        return tensor if place is None or place.shape == tensor.shape else tensor.transpose(1, 2)

    def attach(self, model: Any) -> None:
        """Take the model that peft made of self.base, with the adapter's weights in it."""
        self.model = model.eval()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
                for replaced in module.original_module.modules():
                    self._slots.pop(replaced, None)
        for module, slots in self._slots.items():
            for slot in list(slots):
                weight = getattr(module, slot.attribute)
                if not weight.flatten()[0].isnan():
                    self.given[slot.parameter] = weight.detach()
                    slots.remove(slot)

    def fill(self, part: nn.Module) -> None:
        """Read a module's weights of the base into memory, in float32. Raises: ValueError on other shapes."""
        for module in part.modules():
            for slot in self._slots.get(module, ()):
                values = self.value(slot.parameter)
                if values.shape != slot.placeholder.shape:
                    raise ValueError(
                        f"{slot.parameter} is {tuple(values.shape)} in the base's files, and"
                        f" {tuple(slot.placeholder.shape)} by its config.json; download it again"
                    )
                setattr(module, slot.attribute, nn.Parameter(values.float(), requires_grad=False))

    def drop(self, part: nn.Module) -> None:
        """Free the memory of a module's weights."""
        for module in part.modules():
            for slot in self._slots.get(module, ()):
                setattr(module, slot.attribute, slot.placeholder)

    def logits(self, batch: Mapping[str, Tensor], progress: LongWork, title: str) -> Tensor:
        """Return float32 logits [prompts, last KEPT tokens, vocabulary]; 0 on padding (left)."""
        parts = [part for _, part in _topmost(self.model, self._is_unit)]
        task = progress.add_task(title, total=len(parts))

        def fill(part: nn.Module, _: object) -> None:
            self.fill(part)

        def drop(part: nn.Module, *_: object) -> None:
            self.drop(part)
            progress.advance(task)

        hooks = [part.register_forward_pre_hook(fill) for part in parts]
        hooks += [part.register_forward_hook(drop) for part in parts]
        try:
            with torch.no_grad():
                logits: Tensor = self.model(**batch, logits_to_keep=KEPT, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits.masked_fill(batch["attention_mask"][:, -KEPT:, None] == 0, 0.0)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in self.base, merged float32 values) of what the adapter changes; do not keep them.

        Afterwards peft takes the modules for merged ones, so the model can compute nothing more.
        """
        wrappers = list(_topmost(self.model.base_model.model, lambda module: isinstance(module, WRAPPERS)))
        within = tuple(f"{path}." for path, _ in wrappers)
        yield from ((name, values) for name, values in self.given.items() if not name.startswith(within))
        for path, wrapper in wrappers:
            yield from self._merged(path, wrapper)

    def still_tied(self) -> bool:
        """Return whether the base's tied parameters stay equal after a merge; changes nothing."""
        modules = [self.model.base_model.model.get_submodule(name.rpartition(".")[0]) for name in self.tied]
        tensors = {tensor for name in self.tied for tensor in self.names(name)}
        adapted = any(isinstance(m, WRAPPERS) for m in modules) or self.given.keys() & set(self.tied)
        if len(tensors) < 2 and not adapted:
            return True
        first, *others = (self._effective(*pair) for pair in zip(self.tied, modules, strict=True))
        return all(torch.equal(first, other) for other in others)

    def _effective(self, name: str, module: Any) -> Tensor:
        if isinstance(module, WRAPPERS):
            values = dict(self._merged(name.rpartition(".")[0], module))[name]
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.merged_adapters.clear()
            return values
        slot = next((slot for slot in self._slots[module] if name.endswith(slot.attribute)), None)
        return self.value(slot.parameter).float() if slot else self.given[name]

    def _merged(self, path: str, wrapper: Any) -> Iterator[tuple[str, Tensor]]:
        self.fill(wrapper)
        if hasattr(wrapper, "unload_and_optionally_merge_module"):
            plain = wrapper.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        else:
            wrapper.merge()
            plain = wrapper.get_base_layer()
        merged = [(f"{path}.{name}", values.detach()) for name, values in plain.named_parameters()]
        self.drop(wrapper)
        while merged:
            yield merged.pop(0)

    def _is_unit(self, module: nn.Module) -> bool:
        """Whether a module's weights are in memory together."""
        return (
            type(module).__name__ in self._layers or isinstance(module, WRAPPERS) or bool(module._parameters)
        )


class LogitDifference(NamedTuple):
    """How far logits are apart. difference: the largest; worst: the number of its prompt.

    judged: must not exceed bound; the largest difference, or with experts the geometric mean over all tokens.
    rounding: the same measure, of weights that are only rounded once more.
    """

    difference: float
    worst: int
    judged: float
    rounding: float
    bound: float


def compare_logits(
    unmerged: Tensor,
    merged_model: StreamedModel,
    rounded_model: StreamedModel,
    batch: Mapping[str, Tensor],
    progress: LongWork,
) -> LogitDifference:
    """Compare logits with those of a merged model. rounded_model: the same, its weights rounded once more.

    Rounding moves logits, far in a deep model or bfloat16, so its effect is measured. With experts, a last
    bit may choose another expert and move a token's logits far: there the largest difference is chance.
    """
    merged = merged_model.logits(batch, progress, "merged model")
    rounded = rounded_model.logits(batch, progress, "effect of rounding")
    config = merged_model.base.config.get_text_config()
    routed = bool(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None))
    tokens = batch["attention_mask"][:, -KEPT:].bool()

    def difference(logits: Tensor) -> Tensor:
        return (logits - merged).abs().amax(-1).nan_to_num(torch.inf)

    def judged(each: Tensor) -> float:
        return float(each[tokens].clamp_min(1e-30).log().mean().exp() if routed else each.max())

    each, rounding = difference(unmerged), judged(difference(rounded))
    bound = max(BOUND * max(1.0, float(unmerged.std())), ROUNDINGS * rounding)
    return LogitDifference(float(each.max()), int(each.amax(1).argmax()), judged(each), rounding, bound)


def _topmost(
    module: nn.Module, chosen: Callable[[nn.Module], bool], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the chosen modules that lie in no other chosen module, with their names."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if chosen(child):
            yield place, child
        else:
            yield from _topmost(child, chosen, place)
