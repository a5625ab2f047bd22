"""Which layers of a base an adapter trains, by config and config.json alone, and what a start refuses."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from qwenlora.configs.schema import ALL_LINEAR, Config, Lora
from qwenlora.configs.wording import did_you_mean
from qwenlora.plan.kinds import LEFT_OUT, NOT_LINEAR, kind_of
from qwenlora.plan.shape import Shape, Tensor

PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # {pattern: what it replaces}
# in these types peft takes the names for matrices of the experts, as they were in transformers 4
RENAMED, OF_EXPERTS = ("qwen3_moe", "qwen3_next"), ("gate_proj", "up_proj", "down_proj")


class Reach(NamedTuple):
    """Names of a base's tensors that an adapter trains. adapted: get A and B; saved: are trained in full."""

    adapted: set[str]
    saved: set[str]


def reach_of(lora: Lora, shape: Shape, tensors: Sequence[Tensor]) -> Reach:
    """Return what an adapter trains. tensors: all of the base. Raises: ValueError when its settings name
    nothing in the base, or what a start refuses or only a start can count."""
    check_expressions(lora)
    saved = _saved(lora, shape)
    reach = Reach(
        {tensor.name for tensor in tensors if _is_adapted(lora, tensor, saved)},
        {tensor.name for tensor in tensors if any(map(_ends_in(saved), _modules_of(tensor)))},
    )
    renamed = _renamed(lora, shape, reach)
    _check_left_out(lora, shape, tensors)
    check_names(lora, shape, tensors)
    if not reach.adapted:
        raise ValueError(f"lora.target_modules={lora.target_modules} names no layer of the base")
    _check_patterns(lora, reach.adapted)
    _check_tokens(lora, shape)
    _check_peft(lora, tensors, reach.adapted, renamed)
    return reach


def is_chosen(lora: Lora, name: str) -> bool:
    """Whether neither exclude_modules nor layers_to_transform leave a module or parameter out."""
    layer, layers = re.search(r"\.(\d+)\.", name), lora.layers_to_transform
    if layers is not None and not (layer and int(layer[1]) in layers):
        return False
    return not any(is_excluded(lora.exclude_modules, one) for one in (name, name.rpartition(".")[0]))


def is_excluded(excluded: str | Collection[str] | None, name: str) -> bool:
    """Whether peft's exclude_modules has a name."""
    if isinstance(excluded, str):
        return bool(re.fullmatch(excluded, name))
    return _is_named(name, excluded or ())


def check_expressions(lora: Lora) -> None:
    """Refuse what is no regular expression. Raises: ValueError."""
    expressions = [("target_modules", lora.target_modules), ("exclude_modules", lora.exclude_modules)]
    expressions += [(key, pattern) for key in PATTERNS for pattern in getattr(lora, key)]
    for key, expression in expressions:
        if not isinstance(expression, str):
            continue
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"lora.{key}: {expression} is no regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether peft takes a key of rank_pattern or alpha_pattern for a module's or parameter's name."""
    return bool(re.match(rf"(.*\.)?({pattern})$", name))


def _is_named(name: str, ends: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _ends_in(ends: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a module's name ends so, as peft asks for modules_to_save: without a dot before."""
    return lambda name: name.endswith(tuple(ends))


def _modules_of(tensor: Tensor) -> Iterator[str]:
    """Yield the modules that a tensor lies in, without lists of them."""
    *parts, last = tensor.name.split(".")
    for count, then in enumerate([*parts[1:], last], 1):
        if not then.isdecimal():
            yield ".".join(parts[:count])
    if tensor.experts == 1:  # else it is a parameter
        yield tensor.name


def _is_parameter(lora: Lora, name: str) -> bool:
    """Whether target_parameters names a tensor."""
    return any(_is_named(one, lora.target_parameters or ()) for one in (name, f"{name}.weight"))


def _is_adapted(lora: Lora, tensor: Tensor, saved: Sequence[str]) -> bool:
    """Whether a tensor gets A and B. saved: modules that are trained in full, which peft leaves out."""
    name, kind = tensor.name, kind_of(tensor.name)
    if _is_parameter(lora, name):
        return True
    if lora.target_modules == ALL_LINEAR:
        wanted = tensor.linear or tensor.experts > 1
        adapted = wanted and kind not in (*NOT_LINEAR, *LEFT_OUT[lora.experts])
    elif not tensor.linear and kind != "embeddings":
        adapted = False
    elif isinstance(lora.target_modules, str):
        adapted = bool(re.fullmatch(lora.target_modules, name))
    else:
        adapted = _is_named(name, lora.target_modules)
    return adapted and is_chosen(lora, name) and not _lies_in(saved, name)


def _lies_in(modules: Iterable[str], name: str) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def _saved(lora: Lora, shape: Shape) -> list[str]:
    """Return lora.modules_to_save; either name of a tied matrix means the embeddings."""
    saved = lora.modules_to_save or []
    return ["embed_tokens" if shape.tie_word_embeddings and name == "lm_head" else name for name in saved]


def check_names(lora: Lora, shape: Shape, tensors: Sequence[Tensor]) -> None:
    """Refuse names that the base lacks, which peft would pass over. Raises: ValueError."""
    modules = list(dict.fromkeys(module for tensor in tensors for module in _modules_of(tensor)))
    parameters = [tensor.name for tensor in tensors]
    parameters += [f"{name}.weight" for name in (*modules, *parameters)]
    listed = [] if isinstance(lora.target_modules, str) else lora.target_modules
    _check_ends("target_modules", listed, modules)
    _check_ends("modules_to_save", _saved(lora, shape), modules)
    _check_ends("target_parameters", lora.target_parameters or [], parameters)


def check_divided(config: Config, experts: int) -> None:
    """Refuse strategy.expert_parallel for experts that cannot be divided. experts: of a layer, 0: none.
    Raises: ValueError."""
    size = config.strategy.expert_parallel
    if size == 1 or (experts and experts % size == 0):
        return
    setting = f"strategy.expert_parallel={size} with model.name_or_path={config.model.name_or_path}"
    if not experts:
        raise ValueError(f"{setting}: it has no experts; set strategy.expert_parallel: 1")
    divisors = ", ".join(str(number) for number in range(1, experts + 1) if experts % number == 0)
    raise ValueError(
        f"{setting}: its {experts} experts are no multiple of {size}; set it to one of {divisors}"
    )


def _check_ends(key: str, ends: Iterable[str], there: list[str]) -> None:
    for end in ends:
        if not any(_is_named(name, [end]) for name in there):
            known = sorted({_last(name) for name in there})
            otherwise = f"names in it end in {', '.join(known)}"
            raise ValueError(f"lora.{key}: the base has no {end}; {did_you_mean(end, known, otherwise)}")


def _check_patterns(lora: Lora, adapted: set[str]) -> None:
    """Refuse patterns that match nothing that is adapted."""
    for key in PATTERNS:
        for pattern in getattr(lora, key):
            if not any(matches(pattern, name) for name in adapted):
                raise ValueError(f"lora.{key}: {pattern} matches no layer with LoRA")


def _check_tokens(lora: Lora, shape: Shape) -> None:
    """Refuse tokens that the base has no row for."""
    for module, ids in lora.trained_tokens.items():
        if max(ids) >= shape.vocab_size or (module == "lm_head" and shape.tie_word_embeddings):
            raise ValueError(
                f"lora.trainable_token_indices={lora.trainable_token_indices}: expected ids below"
                f" {shape.vocab_size:,}, of embed_tokens where head and embeddings are one matrix"
            )


def _names_of_linear(tensor: Tensor) -> tuple[str, ...]:
    if tensor.experts > 1:  # a stack of them, in a module
        return tensor.name, tensor.name.rpartition(".")[0]
    return (tensor.name,) if tensor.linear else ()


def _check_left_out(lora: Lora, shape: Shape, tensors: Sequence[Tensor]) -> None:
    """Refuse layers and modules to leave out that the base lacks."""
    last, highest = shape.num_hidden_layers - 1, max(lora.layers_to_transform or [0])
    if highest > last:
        raise ValueError(f"lora.layers_to_transform: the base has no layer {highest}; its last is {last}")
    excluded = lora.exclude_modules
    there = {name for tensor in tensors for name in _names_of_linear(tensor)}
    for one in [excluded] if isinstance(excluded, str) else excluded or ():
        alone = one if isinstance(excluded, str) else [one]
        if not any(is_excluded(alone, name) for name in there):
            raise ValueError(f"lora.exclude_modules: the base has no linear layer {one}")


def _renamed(lora: Lora, shape: Shape, reach: Reach) -> set[str]:
    """Return the linear layers that peft takes for the experts' matrices. Raises: ValueError when the config
    names any itself."""
    if shape.model_type not in RENAMED or shape.with_vision:
        return set()
    single = {name for name in reach.adapted if kind_of(name) != "experts"}
    renamed = {name for name in single if _last(name) in OF_EXPERTS}
    if lora.target_modules == ALL_LINEAR:
        return renamed
    listed = () if isinstance(lora.target_modules, str) else lora.target_modules
    if theirs := sorted(renamed) + [name for name in listed if _last(name) in (*OF_EXPERTS, "gate")]:
        raise ValueError(
            f"lora.target_modules: in a {shape.model_type} peft takes {theirs[-1]} for matrices of all"
            " experts, which a plan does not count; name them in target_parameters"
        )
    return set()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _check_peft(lora: Lora, tensors: Sequence[Tensor], adapted: set[str], renamed: set[str]) -> None:
    """Refuse settings that peft does not have for parameters."""
    stacked = {tensor.name for tensor in tensors if tensor.experts > 1} & adapted
    if stacked and (lora.takes_from_base or lora.init_lora_weights == "eva"):
        raise ValueError(
            f"lora.init_lora_weights={lora.init_lora_weights} is for linear layers of the decoder, and"
            f" {min(stacked)} is none; set lora.experts: shared, which leaves them out, or set it to gaussian"
        )
    parameters = sorted(stacked | renamed | {name for name in adapted if _is_parameter(lora, name)})
    if not parameters:
        return
    for setting, is_set, instead in (
        (f"lora_dropout={lora.lora_dropout}", lora.lora_dropout > 0, "0"),
        ("use_dora=true", lora.use_dora, "false"),
    ):
        if is_set:
            raise ValueError(
                f"lora.{setting} does not go with LoRA on {parameters[0]}, which peft knows as a parameter:"
                f" set it to {instead}, or leave those out, as with lora.experts: none"
            )
