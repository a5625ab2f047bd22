"""Sequences that several ranks share (`strategy.sequence_parallel`), by DeepSpeed-Ulysses' method.

The ranks of a team hold a slice of each sequence. Attention alone needs the whole: it exchanges slices of the
sequence for slices of the heads, runs the usual kernel, and exchanges back. A rank's loss is the sum over its
own tokens by the tokens of the whole global batch, so the sum over all ranks is the loss, and its gradient,
however a sequence is cut: nothing else in training knows of it. Source: https://arxiv.org/abs/2309.14509.
"""

import math
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenlora.configs import Config
from qwenlora.data.order import teams_of
from qwenlora.trainer.model.base import IGNORED

# among transformers' attentions; with "flash" or "sdpa" in it, it would be probed
NAME = "qwenlora_sequence_parallel"
_OF_LENGTH = (
    "dynamic",
    "longrope",
)  # rotary embeddings that look at the longest position of what they are given


class Team(NamedTuple):
    """The ranks that share sequences, as one of them sees it: ranks number * size to (number + 1) * size - 1.

    size: its ranks; place: this rank's among them; number: this team's; teams: how many there are.
    """

    size: int = 1
    place: int = 0
    number: int = 0
    teams: int = 1
    group: Any = None

    def cut(self, batch: dict[str, Tensor], pad_id: int) -> dict[str, Tensor]:
        """Return this rank's slice of a batch of whole rows or packs, all slices of the same width.

        Labels are shifted before they are cut: the last token of a slice learns from the first of the next.
        There is no
        attention_mask: rows are padded on the right, where a causal model's other tokens do not look.
        """
        if self.size == 1:
            return batch
        rows, length = batch["input_ids"].shape
        width = math.ceil(length / self.size)
        more = width * self.size - length
        positions = batch.get("position_ids")
        whole = {}
        if positions is None:
            positions = torch.arange(width * self.size).expand(rows, -1)
        else:  # of packs; padding is rows of one token
            whole["whole_position_ids"] = positions = pad(positions, (0, more))
        sequences = {
            "input_ids": pad(batch["input_ids"], (0, more), value=pad_id),
            "shift_labels": pad(batch["labels"][:, 1:], (0, 1 + more), value=IGNORED),
            "position_ids": positions,
        }
        mine = slice(self.place * width, (self.place + 1) * width)
        cut = {name: tensor[:, mine].contiguous() for name, tensor in sequences.items()}
        # Trainer and the model ask for labels, and use shift_labels where these are given
        return cut | {"labels": cut["shift_labels"]} | whole


def team_of(size: int, timeout_s: int = 1800) -> Team:
    """Return this rank's team; all ranks call it. Raises: ValueError when size does not divide their
    number."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    teams = teams_of(world_size, size)
    if size == 1:
        return Team(number=rank, teams=teams)
    make_groups: Any = dist.new_subgroups
    group, _ = make_groups(size, timeout=timedelta(seconds=timeout_s))
    return Team(size, rank % size, rank // size, teams, group)


def check(config: Config, model: Any) -> None:
    """Refuse a model whose sequences cannot be shared. model: its transformers config.

    Raises: ValueError, one line.
    """
    size, text = config.strategy.sequence_parallel, model.get_text_config()
    if size == 1:
        return
    said = f"strategy.sequence_parallel={size} with model.name_or_path={config.model.name_or_path}"
    heads = text.num_attention_heads
    if heads % size:
        fit = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ValueError(
            f"{said}: its {heads} attention heads are no multiple of {size}; set it to one of {fit}"
        )
    if (kind := (getattr(text, "rope_parameters", None) or {}).get("rope_type")) in _OF_LENGTH:
        raise ValueError(
            f"{said}: its rope_type is {kind}, which depends on a sequence's length, and a GPU has a part of"
            " it; set strategy.sequence_parallel: 1"
        )
    flash = config.model.attn_implementation.startswith("flash")
    can = {"full_attention", *(["sliding_attention"] if flash else [])}
    if other := sorted(set(getattr(text, "layer_types", None) or ()) - can):
        cure = "model.attn_implementation: flash_attention_2" if other == ["sliding_attention"] else ""
        raise ValueError(
            f"{said}: it has layers of {' and '.join(other)}, which need more than whole heads; set"
            f" {cure or 'strategy.sequence_parallel: 1'}"
        )


def share_attention(model: Any, team: Team) -> None:
    """Have a model's attention run on whole sequences, of which this rank holds slices. Raises:
    ValueError."""
    if team.size == 1:
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"strategy.sequence_parallel={team.size}: {type(model).__name__} has an attention of its own,"
            " which cannot be exchanged; set strategy.sequence_parallel: 1"
        )
    kernel = model.config._attn_implementation

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any
    ) -> tuple[Tensor, None]:
        assert mask is None, "a mask of this rank's slice says nothing of the whole"
        how["position_ids"] = how.pop("whole_position_ids", None)
        return _attend(team, kernel, module, query, key, value, how), None

    # no mask function of this name: transformers then makes no mask
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    model.config._attn_implementation = NAME


def _attend(
    team: Team, kernel: str, module: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]
) -> Tensor:
    """Return attention over whole sequences, [batch, width, heads, dim]; query, key, value: [batch, heads,
    width, dim].

    Fewer KV heads than ranks (or no multiple) are repeated, as often as makes each query head meet its own.
    """
    size, heads, kv_heads = team.size, query.shape[1], key.shape[1]
    repeats = size // math.gcd(size, kv_heads)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    shares = [tensor.view(len(tensor), size, -1, *tensor.shape[2:]) for tensor in (query, key, value)]
    counts = [share.shape[2] for share in shares]
    # one message instead of three: [ranks, batch, its heads, width, dim], then [batch, own heads, whole
    # width, dim]
    exchange: Any = _Exchange.apply
    mine = exchange(torch.cat(shares, 2).movedim(1, 0), team.group).movedim(0, 2).flatten(2, 3)
    as_kernel_sees = _Seen(
        module,
        num_key_value_groups=heads // (kv_heads * repeats),
        config=_Seen(module.config, _attn_implementation=kernel),
    )
    whole, _ = ALL_ATTENTION_FUNCTIONS[kernel](as_kernel_sees, *mine.split(counts, 1), None, **how)
    # [ranks, batch, width, own heads, dim], then the heads of all ranks side by side
    back: Tensor = exchange(whole.unflatten(1, (size, -1)).movedim(1, 0), team.group)
    return back.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """All-to-all: part j of the first dimension goes to rank j of the team, and from rank j comes part j."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.forward(ctx, gradient, ctx.group), None


class _Seen:
    """An object with some attributes that are others: a kernel asks the module for its name and its number of
    heads."""

    def __init__(self, real: Any, **others: Any) -> None:
        self.__dict__ = {"_real": real, **others}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
