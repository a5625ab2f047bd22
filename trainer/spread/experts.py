"""Experts that ranks divide among them (`strategy.expert_parallel`).

Each rank of a team holds some of each layer's experts with their LoRA, and all else; it trains rows of its
own. In a layer a token goes to the ranks that have experts of its, to each of them once, and the sums of what
these make of it come back; the backward pass goes the same ways. So the gradients of an expert are summed
over its team's rows already, and only the ranks that hold the same experts in other teams add theirs.

What is saved is whole: an adapter's and an optimizer's parts are gathered by name, and cut when they are
read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.fused_experts import (
    DOWN,
    UP,
    chain,
    is_part,
    mixtures,
    sums,
    without_lora,
    wrappers_in,
)
from qwenlora.trainer.model.fused_lora import ADAPTER
from qwenlora.trainer.model.nf4_experts import shape_of
from qwenlora.trainer.spread.sequence import Team, team_of


def divide(model: Any, config: Config) -> "DividedExperts | None":
    """Leave of the LoRA on experts what belongs to this rank's, and have tokens exchanged, where the config
    says so; all ranks call it. model: peft's, fused, with the part of the base that load_divided loads.
    Raises: ValueError when something else of the experts is trained."""
    size = config.strategy.expert_parallel
    if size == 1:
        return None
    _refuse_whole_experts(model, size)
    divided = DividedExperts(model, team_of(size, config.launch.ddp_timeout_s), config.launch.ddp_timeout_s)
    wrappers = {id(wrapper.get_base_layer()): wrapper for wrapper in wrappers_in(model)}
    for _, experts in mixtures(model):
        outer = wrappers.get(id(experts), experts)
        compute = partial(without_lora, experts) if outer is experts else outer.forward
        outer.forward = partial(_exchanged, compute, divided.team, shape_of(getattr(experts, UP))[0])
    return divided


def _refuse_whole_experts(model: Any, size: int) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if whole := [name for name in trained if name.endswith((f".{UP}", f".{DOWN}"))]:
        raise ValueError(
            f"strategy.expert_parallel={size}: lora.modules_to_save trains {whole[0]}, and each GPU has some"
            " of the experts; leave it out, or set strategy.expert_parallel: 1"
        )


# ---- tokens


class Routes(NamedTuple):
    """The ways of a batch's tokens. tokens: those that are sent, to the first rank, the second ...; sent,
    received: how many to and from each rank; number: of the batch; group: torch's, of the team."""

    tokens: Tensor
    sent: list[int]
    received: list[int]
    number: int
    group: Any

    def send(self, values: Tensor) -> Tensor:
        """Return what the other ranks send here of their tokens. values: [tokens, ...]."""
        return self._exchange(values.index_select(0, self.tokens), self.sent, self.received)

    def bring_back(self, rows: Tensor) -> Tensor:
        """Return the sums for each token of what other ranks made of it. rows: of what send() returned."""
        return sums(self._exchange(rows, self.received, self.sent), self.tokens, self.number)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.group)
        return arrived


def routes_of(ranks: Tensor, team: Team) -> Routes:
    """Return the ways of tokens to the ranks of a team. ranks: [tokens, top_k], those that each has to
    reach."""
    reached = torch.zeros(len(ranks), team.size, dtype=torch.bool, device=ranks.device)
    sent = reached.scatter_(1, ranks, True).sum(0)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=team.group)
    tokens = reached.t().nonzero()[:, 1]
    return Routes(tokens, sent.tolist(), received.tolist(), len(ranks), team.group)


def _exchanged(
    compute: Callable[..., Tensor], team: Team, there: int, x: Tensor, chosen: Tensor, shares: Tensor
) -> Tensor:
    """Compute a layer's experts, divided over a team. compute: those of this rank, there of them. x: [tokens,
    hidden]; chosen, shares: [tokens, top_k], each token's experts, and their shares in the sum."""
    routes = routes_of(chosen // there, team)
    here = routes.send(chosen) - team.rank * there
    here = here.where((here >= 0) & (here < there), there)
    moved: Callable[..., Tensor] = _Moved.apply
    x_there, shares_there = (moved(values, routes.send, routes.bring_back) for values in (x, shares))
    return moved(compute(x_there, here, shares_there), routes.bring_back, routes.send)


class _Moved(torch.autograd.Function):
    """Rows that are moved between ranks; their gradient is moved back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


# ---- the adapter


class _Part(NamedTuple):
    """A [experts * r, in] or B [out, r * experts] of a layer's experts, there of which are this rank's.
    shape: of this part; whole: of all; is_b: in which experts take turns."""

    parameter: nn.Parameter
    there: int
    shape: torch.Size
    whole: torch.Size
    is_b: bool


class DividedExperts:
    """The trained weights on experts, of which this rank has a part. team: the ranks that divide them."""

    def __init__(self, model: Any, team: Team, timeout_s: int) -> None:
        self.team = team
        self._alike: Any = None  # the ranks of all teams with the same experts
        if team.teams > 1:
            rows = [list(range(number, team.size * team.teams, team.size)) for number in range(team.size)]
            make_groups: Any = dist.new_subgroups_by_enumeration
            self._alike, _ = make_groups(rows, timeout=timedelta(seconds=timeout_s))
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._parts = {names[part.parameter]: part for part in _parts_of(model, team.size)}
        self._cut()

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are here in part."""
        return list(self._parts)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the parameters while the context is open; all ranks must enter it."""
        for name, part in self._parts.items():
            part.parameter.data = self.gathered(name, part.parameter.data)
        try:
            yield
        finally:
            self._cut()

    def _cut(self) -> None:
        for name, part in self._parts.items():
            part.parameter.data = self.cut(name, part.parameter.data)

    def gathered(self, name: str, values: Tensor) -> Tensor:
        """Return the whole of a parameter, or of what an optimizer keeps for each of its numbers, of which
        ranks have parts; other values as they are. All ranks call it."""
        part = self._parts.get(name)
        if part is None or values.shape != part.shape:
            return values
        parts = [torch.empty_like(values) for _ in range(self.team.size)]
        dist.all_gather(parts, values.contiguous(), group=self.team.group)
        if part.is_b:
            return torch.cat([one.view(-1, part.there) for one in parts], 1).view(part.whole)
        return torch.cat(parts)

    def cut(self, name: str, values: Tensor) -> Tensor:
        """Return this rank's part of what gathered() returned."""
        part = self._parts.get(name)
        if part is None or values.shape != part.whole:
            return values
        number, size = self.team.rank, self.team.size
        mine = values.view(-1, size, part.there)[:, number] if part.is_b else values.view(size, -1)[number]
        return mine.reshape(part.shape).clone()

    def reduce(self) -> None:
        """Make a step's gradients those of the mean over all ranks, as DDP makes the others; all ranks call
        it."""
        for part in self._parts.values():
            assert part.parameter.grad is not None, "each rank computes its experts, even without a token"
            if self.team.teams > 1:
                dist.all_reduce(part.parameter.grad, group=self._alike)
            part.parameter.grad.div_(self.team.teams * self.team.size)

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clip the gradients of a model to a norm, and return what it was: that of all experts, each once.

        Source: torch.nn.utils.clip_grad_norm_.
        """
        mine = {id(part.parameter) for part in self._parts.values()}
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        of_experts = _squared(one for one in trained if id(one) in mine).to(trained[0].device)
        dist.all_reduce(of_experts, group=self.team.group)
        norm = (
            _squared(one for one in trained if id(one) not in mine).to(of_experts.device) + of_experts
        ).sqrt()
        clip_grads_with_norm_(trained, limit, norm)
        return norm


def _parts_of(model: Any, size: int) -> Iterator[_Part]:
    """Yield A and B of experts, still whole, of which each rank is to have one of so many parts."""
    for wrapper in (one for outermost in wrappers_in(model) for one in chain(outermost).values()):
        if not is_part(wrapper.get_param()):
            continue  # a router's
        there = shape_of(wrapper.get_param())[0]
        a, b = wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight
        yield _Part(a, there, torch.Size((len(a) // size, a.shape[1])), a.shape, is_b=False)
        yield _Part(b, there, torch.Size((len(b), b.shape[1] // size)), b.shape, is_b=True)


def _squared(parameters: Iterator[nn.Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in parameters if p.grad is not None]) ** 2
