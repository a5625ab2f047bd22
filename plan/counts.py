"""How many numbers a base has and its adapter trains, by formula: what the preparation counts on torch's meta
device (trainer/model/lora.py), without torch."""

from collections import Counter
from collections.abc import Iterable

from qwenlora.configs.schema import Lora
from qwenlora.plan.adapter import Reach, matches, reach_of
from qwenlora.plan.flops import attention_widths, recurrence, share_of_experts
from qwenlora.plan.kinds import kind_of
from qwenlora.plan.shape import Shape, Tensor, tensors
from qwenlora.plan.widths import widths
from qwenlora.run.records import OfKind, Parameters, Work

OUTSIDE = ("head", "embeddings")  # kinds that are no part of the body


def count(shape: Shape, lora: Lora) -> Parameters:
    """Return the counts of a base with the config's adapter. Raises: ValueError as reach_of
    does."""
    all_tensors = list(tensors(shape))
    reach = reach_of(lora, shape, all_tensors)
    total, body = _sum(all_tensors), _sum(t for t in all_tensors if kind_of(t.name) not in OUTSIDE)
    experts = sum(t.total for t in all_tensors if t.experts > 1)
    share = share_of_experts(shape)
    trained = {t.name: _trained(lora, t, reach) for t in all_tensors}
    return Parameters(
        total=total,
        trainable=sum(trained.values()),
        body=body,
        head=shape.vocab_size * shape.hidden_size,
        layers=shape.num_hidden_layers,
        **widths(shape, (t.name for t in all_tensors)),
        work=_work(shape, lora, all_tensors, reach),
        kinds=_kinds(all_tensors, trained, reach),
        active=total - experts + round(experts * share),
        begun=sum(_lora_numbers(lora, t) for t in all_tensors if t.name in reach.adapted - reach.saved)
        * lora.takes_from_base,
    )


def _sum(those: Iterable[Tensor]) -> int:
    return sum(tensor.total for tensor in those)


def _rank(lora: Lora, name: str) -> int:
    """Return the rank of a tensor's A and B; of the patterns that match, peft takes the first."""
    return next((r for pattern, r in lora.rank_pattern.items() if matches(pattern, name)), lora.r)


def _lora_numbers(lora: Lora, tensor: Tensor) -> int:
    return _rank(lora, tensor.name) * tensor.experts * (tensor.outputs + tensor.inputs)


def _trained(lora: Lora, tensor: Tensor, reach: Reach) -> int:
    if tensor.name in reach.saved:
        return tensor.total
    magnitudes = tensor.outputs if lora.use_dora else 0
    adapter = _lora_numbers(lora, tensor) + magnitudes if tensor.name in reach.adapted else 0
    return adapter + _single_rows(lora, tensor)


def _single_rows(lora: Lora, tensor: Tensor) -> int:
    """Return the numbers of a matrix's rows that are trained alone, by trainable_token_indices."""
    return len(lora.trained_tokens.get(tensor.name.rpartition(".")[2], ())) * tensor.inputs


def _work(shape: Shape, lora: Lora, all_tensors: list[Tensor], reach: Reach) -> Work:
    share, frozen, trained = share_of_experts(shape), 0.0, 0.0
    adapted, saved, embeddings = reach.adapted - reach.saved, reach.saved, all_tensors[0].name
    of_head = {False: 0, True: 0}
    for tensor in all_tensors:
        adapter = _lora_numbers(lora, tensor) if tensor.name in adapted else 0
        if kind_of(tensor.name) == "head":
            of_head[(embeddings if tensor.tied else tensor.name) in saved] += tensor.matrix
            of_head[True] += adapter + _single_rows(lora, all_tensors[0] if tensor.tied else tensor)
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


def _kinds(all_tensors: list[Tensor], trained: dict[str, int], reach: Reach) -> dict[str, OfKind]:
    totals: Counter[str] = Counter()
    matrices: Counter[str] = Counter()
    of_adapter: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    for tensor in all_tensors:
        kind = kind_of(tensor.name)
        totals[kind] += tensor.total
        matrices[kind] += tensor.linear or tensor.experts > 1
        of_adapter[kind] += trained[tensor.name]
        is_saved = tensor.matrix > 0 and tensor.name in reach.saved
        reached[kind] += tensor.name in reach.adapted or is_saved
    return {
        kind: OfKind(
            total=totals[kind], matrices=matrices[kind], trained=of_adapter[kind], adapted=reached[kind]
        )
        for kind in totals
    }
