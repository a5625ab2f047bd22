"""A model whose weights stay in their files: of it, one decoder layer or embedding at a time is in memory.

`Streamed` computes logits so, in float32 on the CPU, with an adapter or without, and gives the parameters
that the adapter changes, merged, one after the other. How names and cuts of files become parameters is
transformers' own conversion (files hold experts one by one, models as one parameter), and what a merge is,
peft's.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qwenlora.adapter.weight_files import Files, whole
from qwenlora.trainer.spread.sharded_loading import weights_of

BOUND = 1e-4  # of logits, or of their spread where that is above 1: what float32 itself may cause
ROUNDINGS = 4  # so many times what rounding the weights once causes is still taken for rounding
KEPT = 8  # last tokens of each prompt whose logits are looked at: of all, they would not fit
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Slot(NamedTuple):
    """Where a module has a weight. hollow: what stands there while it is in no memory, a NaN of the weight's
    shape."""

    attribute: str
    parameter: str
    hollow: nn.Parameter


class Streamed:
    """A causal language model over open files. config: transformers'.

    base: the model as transformers made it, without weights. model: what computes, as attach() left it.
    given: parameters of the base that the adapter itself has, whole. tied: the names of the one that has
    several.
    Raises: ValueError when one has none, or of another shape.
    """

    def __init__(self, config: Any, files: Files, *, trust_remote_code: bool = False) -> None:
        with init_empty_weights(include_buffers=False):
            self.base: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        self.base.tie_weights()
        self.base.requires_grad_(False).eval()
        self.model: Any = self.base
        self.files = files
        self.given: dict[str, Tensor] = {}
        self._layers = set(self.base._no_split_modules or ())
        self._sources: dict[str, list[tuple[str, str]]] = {}
        self._converters: dict[str, Any] = {}
        self._match()
        self._slots: dict[nn.Module, list[Slot]] = {}
        self.tied: list[str] = []
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
            # small ones are real, for an adapter may bring a bias
            shape, nan = weight.parameter.shape, torch.tensor(float("nan"))
            hollow = weight.substitute(
                nn.Parameter(nan.repeat(shape) if len(shape) == 1 else nan.expand(shape), False)
            )
            for module, attribute in weight.holders:
                own = f"{paths[module]}.{attribute}".lstrip(".")
                slot = Slot(attribute, own if own in self._sources else made_of, hollow)
                self._slots.setdefault(module, []).append(slot)
        for name, buffer in self.base.named_buffers():
            if name in self._sources:
                buffer.copy_(self.value(name))

    def _match(self) -> None:
        """Find what each parameter is made of, as transformers' from_pretrained does."""
        conversions = get_model_conversion_mapping(self.base)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        there = self.base.state_dict()
        for name in sorted(self.files.places, key=dot_natural_key):
            prefix = self.base.base_model_prefix
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, there)
            if parameter not in there and name in there:
                parameter, pattern = name, None
            if parameter in there:
                self._sources.setdefault(parameter, []).append((pattern or "", name))
        self.base._weight_conversions = [entry for entry in conversions if entry.was_used()]  # the way back

    def names(self, parameter: str) -> list[str]:
        """Return the names, in the files, of what a parameter is made of; empty when it is tied to
        another."""
        return [name for _, name in self._sources.get(parameter, ())]

    def value(self, parameter: str) -> Tensor:
        """Return the base's parameter, in the dtype of its files. Of one that they lack: what it is tied
        to."""
        sources = next(self._sources[name] for name in (parameter, *self.tied) if name in self._sources)
        if not sources[0][0]:
            values = whole(self.files, sources[0][1])
        else:
            conversion = deepcopy(self._converters[sources[0][0]])
            for pattern, name in sources:
                conversion.add_tensor(parameter, name, pattern, whole(self.files, name))
            made = conversion.convert(parameter, model=self.base, config=self.base.config)[parameter]
            values = made[0] if isinstance(made, list) else made
        return values

    def as_filed(self, parameter: str, values: Tensor) -> dict[str, Tensor]:
        """Return a parameter under the names, and in the cuts, that the files have or would have."""
        sources = self._sources.get(parameter)
        if sources and not sources[0][0]:
            return {sources[0][1]: values}
        filed: dict[str, Tensor] = revert_weight_conversion(self.base, {parameter: values})
        return filed

    def attach(self, model: Any) -> None:
        """Take what peft made of self.base, with the adapter's weights in it."""
        self.model = model.eval()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
                for replaced in module.original_module.modules():
                    self._slots.pop(replaced, None)
        for module, slots in self._slots.items():
            for slot in list(slots):
                held = getattr(module, slot.attribute)
                if not held.flatten()[0].isnan():
                    self.given[slot.parameter] = held.detach()
                    slots.remove(slot)

    def fill(self, part: nn.Module) -> None:
        """Read the base's weights of a module into memory, in float32."""
        for module in part.modules():
            for slot in self._slots.get(module, ()):
                values = self.value(slot.parameter)
                if values.shape != slot.hollow.shape:
                    raise ValueError(
                        f"{slot.parameter} is {tuple(values.shape)} in the base's files, and"
                        f" {tuple(slot.hollow.shape)} by its config.json; download it again"
                    )
                setattr(module, slot.attribute, nn.Parameter(values.float(), requires_grad=False))

    def drop(self, part: nn.Module) -> None:
        """Give their memory back."""
        for module in part.modules():
            for slot in self._slots.get(module, ()):
                setattr(module, slot.attribute, slot.hollow)

    def logits(self, batch: Mapping[str, Tensor], progress: Progress, what: str) -> Tensor:
        """Return float32 logits of the last tokens, [prompts, KEPT, vocabulary]; those of padding are 0.

        batch: what the model takes, padded on the left.
        """
        parts = [part for _, part in _topmost(self.model, self._runs_whole)]
        task = progress.add_task(what, total=len(parts))

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
        """Yield the parameters that the adapter changes, in float32, by their names in self.base. Not to be
        kept.

        Afterwards peft takes the modules for merged ones: the model computes nothing any more.
        """
        wrappers = list(_topmost(self.model.base_model.model, lambda module: isinstance(module, WRAPPERS)))
        within = tuple(f"{path}." for path, _ in wrappers)
        yield from ((name, values) for name, values in self.given.items() if not name.startswith(within))
        for path, wrapper in wrappers:
            yield from self._merged(path, wrapper)

    def still_tied(self) -> bool:
        """Return whether parameters that the base has tied are equal after a merge, too. Nothing is
        changed."""
        modules = [self.model.base_model.model.get_submodule(name.rpartition(".")[0]) for name in self.tied]
        held = {file for name in self.tied for file in self.names(name)}
        if (
            len(held) < 2
            and not any(isinstance(m, WRAPPERS) for m in modules)
            and not self.given.keys() & set(self.tied)
        ):
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
        found = [(f"{path}.{name}", values.detach()) for name, values in plain.named_parameters()]
        self.drop(wrapper)
        while found:
            yield found.pop(0)

    def _runs_whole(self, module: nn.Module) -> bool:
        return (
            type(module).__name__ in self._layers or isinstance(module, WRAPPERS) or bool(module._parameters)
        )


class Compared(NamedTuple):
    """How far logits are apart. difference: of all; worst: the prompt, by its number.

    judged: what must not be above bound, the difference itself, or with experts its geometric mean over all
    tokens.
    rounding: how much of that rounding alone causes.
    """

    difference: float
    worst: int
    judged: float
    rounding: float
    bound: float


def compare(
    unmerged: Tensor, made: Streamed, again: Streamed, batch: Mapping[str, Tensor], progress: Progress
) -> Compared:
    """Compare logits with those of a merged model. again: the same model, its weights rounded once more.

    Rounded weights give other logits, in a deep model or in bfloat16 much so. How far rounding moves them is
    measured, not guessed. With experts, a number's last bit may choose another expert, which moves that
    token's logits far: there the largest difference is chance.
    """
    merged = made.logits(batch, progress, "merged model")
    moved = again.logits(batch, progress, "what rounding does")
    config = made.base.config.get_text_config()
    routed = bool(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None))
    tokens = batch["attention_mask"][:, -KEPT:].bool()

    def apart(logits: Tensor) -> Tensor:
        return (logits - merged).abs().amax(-1).nan_to_num(torch.inf)

    def judged(each: Tensor) -> float:
        return float(each[tokens].clamp_min(1e-30).log().mean().exp() if routed else each.max())

    each, rounding = apart(unmerged), judged(apart(moved))
    bound = max(BOUND * max(1.0, float(unmerged.std())), ROUNDINGS * rounding)
    return Compared(float(each.max()), int(each.amax(1).argmax()), judged(each), rounding, bound)


def _topmost(
    module: nn.Module, chosen: Callable[[nn.Module], bool], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the chosen modules that lie in no other chosen one, with their names."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if chosen(child):
            yield place, child
        else:
            yield from _topmost(child, chosen, place)
