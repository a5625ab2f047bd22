"""How many numbers a base has and its adapter trains, by formula: what the preparation counts on torch's meta
device (trainer/model/lora.py), without torch."""

import re
from collections import Counter
from collections.abc import Iterable

from qwenlora.configs.schema import ALL_LINEAR, Lora
from qwenlora.plan.flops import attention_widths, recurrence, share_of_experts
from qwenlora.plan.kinds import LEFT_OUT, NOT_LINEAR, kind_of
from qwenlora.plan.shape import Shape, Tensor, tensors
from qwenlora.plan.widths import widths
from qwenlora.run.records import OfKind, Parameters, Work

OUTSIDE = ("head", "embeddings")  # kinds that are no part of the body


def count(shape: Shape, lora: Lora) -> Parameters:
    """Return the counts of a base with the config's adapter. Raises: ValueError when the adapter's settings
    name nothing in the base, or what only a start can count."""
    all_tensors = list(tensors(shape))
    chosen = {tensor.name for tensor in all_tensors if _is_adapted(lora, tensor)}
    saved = {tensor.name for tensor in all_tensors if _is_named(tensor.name, _saved(lora, shape))}
    _check(lora, shape, chosen, saved)
    total, body = _sum(all_tensors), _sum(t for t in all_tensors if kind_of(t.name) not in OUTSIDE)
    experts = sum(t.total for t in all_tensors if t.experts > 1)
    share = share_of_experts(shape)
    trained = {t.name: _trained(lora, t, chosen, saved) for t in all_tensors}
    return Parameters(
        total=total,
        trainable=sum(trained.values()),
        body=body,
        head=shape.vocab_size * shape.hidden_size,
        layers=shape.num_hidden_layers,
        **widths(shape),
        work=_work(shape, lora, all_tensors, chosen, saved),
        kinds=_kinds(all_tensors, trained, chosen | saved),
        active=total - experts + round(experts * share),
    )


def _sum(those: Iterable[Tensor]) -> int:
    return sum(tensor.total for tensor in those)


def _saved(lora: Lora, shape: Shape) -> list[str]:
    """Return lora.modules_to_save; either name of a tied matrix means the embeddings."""
    saved = lora.modules_to_save or []
    return ["embed_tokens" if shape.tie_word_embeddings and name == "lm_head" else name for name in saved]


def _is_named(name: str, ends: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _is_adapted(lora: Lora, tensor: Tensor) -> bool:
    """Whether a tensor gets A and B."""
    name, kind = tensor.name, kind_of(tensor.name)
    if _is_named(name, lora.target_parameters or ()) or _is_named(
        f"{name}.weight", lora.target_parameters or ()
    ):
        return True
    if tensor.experts > 1:
        adapted = lora.target_modules == ALL_LINEAR and lora.experts == "all"
    elif lora.target_modules == ALL_LINEAR:
        adapted = tensor.linear and kind not in (*NOT_LINEAR, *LEFT_OUT[lora.experts])
    elif isinstance(lora.target_modules, str):
        adapted = tensor.matrix > 0 and bool(re.fullmatch(lora.target_modules, name))
    else:
        adapted = tensor.matrix > 0 and _is_named(name, lora.target_modules)
    return adapted and _is_chosen(lora, name)


def _is_chosen(lora: Lora, name: str) -> bool:
    excluded, layers = lora.exclude_modules or (), lora.layers_to_transform
    layer = re.search(r"\.(\d+)\.", name)
    if layers is not None and not (layer and int(layer[1]) in layers):
        return False
    both = (name, name.rpartition(".")[0])
    if isinstance(excluded, str):
        return not any(re.fullmatch(excluded, one) for one in both)
    return not any(_is_named(one, excluded) for one in both)


def _check(lora: Lora, shape: Shape, chosen: set[str], saved: set[str]) -> None:
    modules = lora.target_modules if isinstance(lora.target_modules, list) else []
    theirs = {"gate_proj", "up_proj", "down_proj"} & set(modules)
    if theirs and shape.model_type in ("qwen3_moe", "qwen3_next"):
        raise ValueError(
            f"lora.target_modules: peft takes {sorted(theirs)[0]} for the experts' matrices in a"
            f" {shape.model_type}, which a plan does not count; name them in target_parameters"
        )
    for key, names, reached in (
        ("target_modules", modules, chosen),
        ("modules_to_save", _saved(lora, shape), saved),
    ):
        if missing := [name for name in names if not any(_is_named(one, [name]) for one in reached)]:
            raise ValueError(f"lora.{key}: the base has no {missing[0]}")
    if not chosen and not saved:
        raise ValueError(f"lora.target_modules={lora.target_modules} names no layer of the base")


def _rank(lora: Lora, name: str) -> int:
    """Return the rank of a tensor's A and B; of the patterns that match, peft takes the first."""
    matching = (r for pattern, r in lora.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, lora.r)


def _lora_numbers(lora: Lora, tensor: Tensor) -> int:
    return _rank(lora, tensor.name) * tensor.experts * (tensor.outputs + tensor.inputs)


def _trained(lora: Lora, tensor: Tensor, chosen: set[str], saved: set[str]) -> int:
    if tensor.name in saved:
        return tensor.total
    magnitudes = tensor.outputs if lora.use_dora else 0
    return _lora_numbers(lora, tensor) + magnitudes if tensor.name in chosen else 0


def _work(shape: Shape, lora: Lora, all_tensors: list[Tensor], chosen: set[str], saved: set[str]) -> Work:
    share, frozen, trained = share_of_experts(shape), 0.0, 0.0
    of_head = {False: 0, True: 0}
    for tensor in all_tensors:
        adapter = _lora_numbers(lora, tensor) if tensor.name in chosen else 0
        if kind_of(tensor.name) == "head":
            of_head[("model.embed_tokens" if tensor.tied else tensor.name) in saved] += tensor.matrix
            of_head[True] += adapter
        if kind_of(tensor.name) not in OUTSIDE:
            met = share if tensor.experts > 1 else 1.0
            frozen += met * tensor.matrix * (tensor.name not in saved)
            trained += met * (adapter + tensor.matrix * (tensor.name in saved))
    return Work(
        frozen=round(frozen),
        trained=round(trained),
        head_frozen=of_head[False],
        head_trained=of_head[True],
        attention=attention_widths(shape),
        recurrence=recurrence(shape),
    )


def _kinds(all_tensors: list[Tensor], trained: dict[str, int], adapted: set[str]) -> dict[str, OfKind]:
    totals: Counter[str] = Counter()
    matrices: Counter[str] = Counter()
    of_adapter: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    for tensor in all_tensors:
        kind = kind_of(tensor.name)
        totals[kind] += tensor.total
        matrices[kind] += tensor.linear or tensor.experts > 1
        of_adapter[kind] += trained[tensor.name]
        reached[kind] += tensor.name in adapted
    return {
        kind: OfKind(
            total=totals[kind], matrices=matrices[kind], trained=of_adapter[kind], adapted=reached[kind]
        )
        for kind in totals
    }
