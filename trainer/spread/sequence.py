"""Sequences that several ranks share (`strategy.sequence_parallel`), by DeepSpeed-Ulysses' method.

Each rank of a team holds a slice of each sequence. Only attention needs whole sequences: it exchanges slices
of the sequence for slices of the heads, runs the usual kernel, and exchanges back. A rank's loss is the sum
over its own tokens divided by the global batch's tokens, so all ranks' losses add up to the step's loss,
however a sequence is cut; so do gradients. Source: https://arxiv.org/abs/2309.14509
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
from qwenlora.trainer.model.loading import IGNORED
from qwenlora.trainer.model.pretrained import layer_kinds
from qwenlora.trainer.model.row_attention import LINEAR
from qwenlora.trainer.model.suitability import DEPENDS_ON_BATCH, rope_type

# our attention's name in transformers, which treats names with "flash" or "sdpa" in them specially
NAME = "qwenlora_sequence_parallel"


class Team(NamedTuple):
    """The ranks that share sequences with this one: ranks number * size to (number + 1) * size - 1 of all.
    size: of the team; rank: this one's number in it; number: the team's; teams: how many there are; group:
    the team's torch process group, None for a rank on its own."""

    size: int = 1
    rank: int = 0
    number: int = 0
    teams: int = 1
    group: Any = None

    def cut(self, batch: dict[str, Tensor], pad_id: int) -> dict[str, Tensor]:
        """Return this rank's slice of a batch of whole rows or packs, all slices of the same width. Labels
        are shifted before they are cut: the label of a slice's last token is the next slice's first token.
        There is no attention_mask: rows are padded on the right, where no token of a causal model attends."""
        if self.size == 1:
            return batch
        rows, length = batch["input_ids"].shape
        width = math.ceil(length / self.size)
        padding = width * self.size - length
        positions = batch.get("position_ids")
        of_packs: dict[str, Tensor] = {}
        if positions is None:
            positions = torch.arange(width * self.size).expand(rows, -1)
        else:  # positions start anew in each row of a pack; padding counts as rows of one token
            of_packs["whole_position_ids"] = positions = pad(positions, (0, padding))
        sequences = {
            "input_ids": pad(batch["input_ids"], (0, padding), value=pad_id),
            "shift_labels": pad(batch["labels"][:, 1:], (0, 1 + padding), value=IGNORED),
            "position_ids": positions,
        }
        if "loss_weights" in batch:  # shifted already
            sequences["loss_weights"] = pad(batch["loss_weights"], (0, padding))
        mine = slice(self.rank * width, (self.rank + 1) * width)
        cut = {name: tensor[:, mine].contiguous() for name, tensor in sequences.items()}
        # Trainer and the model require labels, and use shift_labels if given
        return cut | {"labels": cut["shift_labels"]} | of_packs


def team_of(size: int, timeout_s: int = 1800) -> Team:
    """Return this rank's team; all ranks call it. Raises: ValueError unless size divides their number."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    teams = teams_of(world_size, size)
    if size == 1:
        return Team(number=rank, teams=teams)
    make_groups: Any = dist.new_subgroups
    group, _ = make_groups(size, timeout=timedelta(seconds=timeout_s))
    return Team(size, rank % size, rank // size, teams, group)


def check(config: Config, model: Any) -> None:
    """Refuse a model whose sequences cannot be shared. model: its transformers config. Raises: ValueError."""
    size, text = config.strategy.sequence_parallel, model.get_text_config()
    if size == 1:
        return
    setting = f"strategy.sequence_parallel={size} with model.name_or_path={config.model.name_or_path}"
    heads = text.num_attention_heads
    if heads % size:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ValueError(
            f"{setting}: its {heads} attention heads are no multiple of {size}; set it to one of {divisors}"
        )
    if (kind := rope_type(model)) in DEPENDS_ON_BATCH:
        raise ValueError(
            f"{setting}: its rope_type is {kind}, which depends on a sequence's length, and a GPU has a"
            " part of it; set strategy.sequence_parallel: 1"
        )
    _check_layers(setting, text, flash=config.model.attn_implementation.startswith("flash"))


def _check_layers(setting: str, text: Any, *, flash: bool) -> None:
    """Refuse layers whose attention cannot be computed head by head from positions alone."""
    shareable = {"full_attention", "sliding_attention"} if flash else {"full_attention"}
    if others := sorted(layer_kinds(text) - shareable):
        flash_helps = others == ["sliding_attention"]
        cure = (
            "model.attn_implementation: flash_attention_2" if flash_helps else "strategy.sequence_parallel: 1"
        )
        why = (
            "whose state runs through a whole sequence, token by token, and a GPU has a part of it"
            if LINEAR in others
            else "which need more than whole heads"
        )
        raise ValueError(f"{setting}: it has layers of {' and '.join(others)}, {why}; set {cure}")


def share_attention(model: Any, team: Team) -> None:
    """Make a model's attention run on whole sequences, of which this rank holds slices. Raises: ValueError
    when the model does not use transformers' exchangeable attentions."""
    if team.size == 1:
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"strategy.sequence_parallel={team.size}: {type(model).__name__} has an attention of its own,"
            " which cannot be exchanged; set strategy.sequence_parallel: 1"
        )
    kernel = model.config._attn_implementation

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None, "a mask of this rank's slice says nothing of the whole sequence"
        options["position_ids"] = options.pop("whole_position_ids", None)
        return _attend(team, kernel, module, query, key, value, options), None

    # no mask function of this name: transformers then makes no mask
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    model.config._attn_implementation = NAME


def _attend(
    team: Team,
    kernel: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, object],
) -> Tensor:
    """Return this rank's slice of attention over whole sequences, [batch, width, heads, dim].

    kernel: its name in transformers, called with options. query, key, value: of this rank's slice, [batch,
    heads, width, dim]. KV heads are repeated where the team's size does not divide their number, so that each
    query head comes to the rank of its own KV head.
    """
    size, heads, kv_heads = team.size, query.shape[1], key.shape[1]
    repeats = size // math.gcd(size, kv_heads)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    shares = [tensor.view(len(tensor), size, -1, *tensor.shape[2:]) for tensor in (query, key, value)]
    counts = [share.shape[2] for share in shares]
    exchange: Any = _Exchange.apply
    # one message instead of three: [ranks, batch, that rank's heads, width, dim] becomes
    # [batch, own heads, whole width, dim]
    mine = exchange(torch.cat(shares, 2).movedim(1, 0), team.group).movedim(0, 2).flatten(2, 3)
    seen_by_kernel = _Overridden(
        module,
        num_key_value_groups=heads // (kv_heads * repeats),
        config=_Overridden(module.config, _attn_implementation=kernel),
    )
    whole, _ = ALL_ATTENTION_FUNCTIONS[kernel](seen_by_kernel, *mine.split(counts, 1), None, **options)
    # [ranks, batch, width, own heads, dim] becomes the heads of all ranks side by side
    back: Tensor = exchange(whole.unflatten(1, (size, -1)).movedim(1, 0), team.group)
    return back.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """All-to-all in a team: rank i's part j of the first dimension becomes rank j's part i."""

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


class _Overridden:
    """An object with some attributes replaced: a kernel reads them from the attention's module."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.__dict__ = {"_original": original, **attributes}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
