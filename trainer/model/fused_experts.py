"""LoRA on the experts of a mixture, one function for autograd: for each token x W, then x A, then B.

peft makes W + dW, a second copy of all experts, for each forward pass; autograd keeps that of each layer, and
makes a gradient as large. Here each expert's rows are multiplied with its own W, A and B by torch's
grouped_mm: on CUDA one kernel for all experts, on the CPU a loop over those that have rows. Kept for the
backward pass are the input, gate and up, and the low-rank products. Of experts in nf4 (nf4_experts.py) a few
are dequantised at a time, in either pass, and nothing dequantised is kept.

`fuse_experts` decides for each mixture; what it does not know keeps peft's way. peft's weights stay where
they are: A [experts * r, in], one expert after the other; B [out, r * experts], in which experts take turns.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from qwenlora.configs.schema import Config
from qwenlora.plan.adapter import check_divided
from qwenlora.trainer.model.fused_lora import ADAPTER, is_changed
from qwenlora.trainer.model.kinds import stacks
from qwenlora.trainer.model.nf4_experts import dtype_of, is_quantised, parts, shape_of

UP, DOWN = "gate_up_proj", "down_proj"
EVEN = 8  # grouped_mm takes rows of whole 16 bytes: eight numbers of bfloat16
# what transformers says of experts that compute down(silu(gate) * up), with weights [experts, out, in]
KNOWN = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of rows, A and B


def fuse_experts(model: Any) -> tuple[int, int]:
    """Fuse a peft model's mixtures that have LoRA on their experts; what is frozen now must stay so. Return
    how many, and how many keep peft's way."""
    outermost = wrappers_in(model)
    fusible = [wrapper for wrapper in outermost if _is_fusible(wrapper)]
    for wrapper in fusible:
        wrapper.forward = MethodType(_forward, wrapper)
    return len(fusible), len(outermost) - len(fusible)


def wrappers_in(model: Any) -> list[Any]:
    """Return peft's wrappers of parameters, as of experts, of those around the same module the outermost."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    wrapped = {id(wrapper.base_layer) for wrapper in wrappers}
    return [wrapper for wrapper in wrappers if id(wrapper) not in wrapped]


def chain(wrapper: Any) -> dict[str, Any]:
    """Return peft's wrappers around the same experts, by the parameter that each adapts."""
    wrappers = {}
    while isinstance(wrapper, ParamWrapper):
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return wrappers


def _is_fusible(wrapper: Any) -> bool:
    wrappers, experts = chain(wrapper), wrapper.get_base_layer()
    return (
        wrappers.keys() <= {UP, DOWN}
        and all(list(one.lora_A) == [ADAPTER] for one in wrappers.values())
        and is_known(experts)
        and all(_is_known_weight(getattr(experts, name)) for name in (UP, DOWN))
    )


def is_known(experts: Any) -> bool:
    """Whether a module of transformers holds experts that are computed here."""
    return (
        all(getattr(experts, name, None) is value for name, value in KNOWN.items())
        and not getattr(experts, "has_post_expert_norm", False)
        and not getattr(experts, "_is_expert_parallel", False)
        and type(experts)._apply_gate.__module__ == "transformers.integrations.moe"  # not the model's own
        and type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and "forward" not in vars(experts)
    )


def mixtures(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, module) of the experts of transformers that can be computed here."""
    return [(name, module) for name, module in model.named_modules() if is_mixture(module)]


def is_mixture(module: nn.Module) -> bool:
    """Whether a module holds experts that can be computed here, of any dtype on any device."""
    weights = [getattr(module, name, None) for name in (UP, DOWN)]
    fit = all(isinstance(one, nn.Parameter) and is_even(shape_of(one)) for one in weights)
    return fit and is_known(module)


def refuse_unknown(model: nn.Module, setting: str, cure: str) -> None:
    """Raise ValueError for a base with experts that cannot be computed here, or not on these GPUs. model: on
    any device; setting: that needs it; cure: for the message."""
    known = {f"{name}.{weight}" for name, _ in mixtures(model) for weight in (UP, DOWN)}
    if unknown := [name for name in stacks(model) if name not in known]:
        raise ValueError(f"{setting}: its experts ({unknown[0]} ...) are not as a Qwen's; {cure}")
    if known and torch.cuda.is_available() and not has_grouped_mm(torch.device("cuda")):
        raise ValueError(
            f"{setting}: its experts need a GPU of compute capability 8.0 or more, which multiplies rows in"
            f" groups; {cure}"
        )


def check(config: Config, model: nn.Module) -> None:
    """Refuse strategy.expert_parallel for a base whose experts cannot be divided. model: the base, on any
    device. Raises: ValueError."""
    size = config.strategy.expert_parallel
    if size == 1:
        return
    setting = f"strategy.expert_parallel={size} with model.name_or_path={config.model.name_or_path}"
    refuse_unknown(model, setting, "set strategy.expert_parallel: 1")
    check_divided(config, next((len(model.get_parameter(name)) for name in stacks(model)), 0))


def _is_known_weight(weight: Any) -> bool:
    """Whether a weight is frozen, of plain numbers or in nf4, and one that grouped_mm takes."""
    shape = getattr(weight, "ds_shape", shape_of(weight))  # ZeRO-3 has it there
    return (
        (type(weight) in (nn.Parameter, DTensor) or is_quantised(weight))
        and not weight.requires_grad
        and dtype_of(weight) in (torch.float32, torch.bfloat16, torch.float16)
        and is_even(shape)
        and has_grouped_mm(weight.device)
    )


def is_even(shape: tuple[int, ...]) -> bool:
    """Whether grouped_mm takes matrices of experts. shape: [experts, out, in]."""
    return not any(size % EVEN for size in shape[1:])


def is_part(weight: Any) -> bool:
    """Whether a weight has some of a layer's experts, and other ranks have the others."""
    shape = shape_of(weight)
    return bool(getattr(weight, "ds_shape", shape) != shape)


def has_grouped_mm(device: torch.device) -> bool:
    """Whether grouped_mm runs on a device."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


# ---- as plain computations. rows: [tokens * top_k, ...], one expert's after the other's


class Groups(NamedTuple):
    """Where each expert's rows end. ends: [experts], int32; numbers: the same on the host, for experts in
    nf4."""

    ends: Tensor
    numbers: list[int]


class Matrices(NamedTuple):
    """A matrix for each expert, weight [experts, out, in] or its nf4, and its LoRA, as peft has it, or
    None."""

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    scaling: float

    @property
    def experts(self) -> int:
        """How many there are."""
        return shape_of(self.weight)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that they are computed in."""
        return dtype_of(self.weight)

    @property
    def low_dtype(self) -> torch.dtype:
        """The dtype of products with A and B: on a CPU float32, in which products of few numbers start five
        times as quickly as in bfloat16. Tensors without numbers stand for a GPU's."""
        on_cpu = self.weight.device.type == "cpu" and not isinstance(self.weight, FakeTensor)
        return torch.float32 if on_cpu else self.dtype


def _pair_of(a: Tensor, b: Tensor, layer: Matrices) -> tuple[Tensor, Tensor]:
    """Return A as [experts, r, in] and B as [experts, out, r], in low_dtype. r is rounded up, with zeros."""
    experts, dtype = layer.experts, layer.low_dtype
    a = a.view(experts, -1, a.shape[1]).to(dtype)
    b = b.to(dtype).view(-1, experts).t().contiguous().view(experts, len(b), -1)
    if more := -a.shape[1] % EVEN:
        a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
    return a, b


def _products(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return rows times their expert's matrix. matrices: [experts, in, out]."""
    output: Tensor = nn.functional.grouped_mm(rows, matrices, offs=ends)
    return output


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return left^T right over each expert's rows, [experts, left's width, right's width]."""
    return _products(left.t(), right, ends)


def _times_weight(rows: Tensor, weight: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
    """Return rows times their expert's weight, or times its transpose."""
    if not is_quantised(weight):
        return _products(rows, weight.mT if transposed else weight, groups.ends)
    _, outer, inner = shape_of(weight)
    output = rows.new_empty(len(rows), outer if transposed else inner)
    for part in parts(weight, groups.numbers):
        matrices = part.matrices.mT if transposed else part.matrices
        output[part.first : part.last] = _products(rows[part.first : part.last], matrices, part.ends)
    return output


def _project(layer: Matrices, rows: Tensor, groups: Groups) -> tuple[Tensor, Tensor | None]:
    """Return rows projected, and their products with A, scaled, [rows, r]."""
    output, ends = _times_weight(rows, layer.weight, groups, transposed=True), groups.ends
    if layer.a is None or layer.b is None:
        return output, None
    a, b = _pair_of(layer.a, layer.b, layer)
    low = _products(rows.to(a.dtype), a.mT, ends).mul_(layer.scaling)
    return output.add_(_products(low, b.mT, ends).to(output.dtype)), low


def _gradients(
    layer: Matrices,
    gradient: Tensor,
    rows: Tensor,
    low: Tensor | None,
    groups: Groups,
    share: Tensor | None = None,
    needed: bool = True,
) -> _Gradients:
    """Return the gradients of rows, A and B. share: [rows, 1], what the gradient is still to be multiplied
    with, which that of rows is not; needed: whether that of rows is."""
    of_rows = _times_weight(gradient, layer.weight, groups, transposed=False) if needed else None
    if layer.a is None or layer.b is None or low is None:
        return of_rows, None, None
    (a, b), ends = _pair_of(layer.a, layer.b, layer), groups.ends
    gradient = gradient.to(a.dtype)
    below = _products(gradient, b, ends).mul_(layer.scaling)
    if of_rows is not None:
        of_rows.add_(_products(below, a, ends).to(of_rows.dtype))
    if share is not None:
        low, below = low * share, below * share
    r = len(layer.a) // layer.experts
    of_a = _outer(below, rows.to(a.dtype), ends)[:, :r].reshape(layer.a.shape)
    of_b = _outer(gradient, low, ends)[:, :, :r].reshape(layer.experts, -1).t().reshape(layer.b.shape)
    return of_rows, of_a.to(layer.a.dtype), of_b.to(layer.b.dtype)


def sums(rows: Tensor, token_of: Tensor, tokens: int) -> Tensor:
    """Return the sum of each token's rows, [tokens, hidden], always added in the same order. token_of: of
    each row."""
    token_of, places = token_of.sort(stable=True)
    starts = torch.searchsorted(token_of, torch.arange(tokens, device=rows.device))
    return nn.functional.embedding_bag(places, rows, starts, mode="sum")


# ---- as a function for autograd


class Mixture(NamedTuple):
    """transformers' module of the experts, and the scalings of LoRA. Its weights are read when they are
    needed: those of a sharded base are there only while their layer runs."""

    experts: Any
    scaling: float
    scaling_of_down: float

    def matrices(self, weights: Any) -> tuple[Matrices, Matrices]:
        """Return gate and up, and down. weights: A and B of each."""
        a, b, a_of_down, b_of_down = weights
        up, down = (getattr(self.experts, name) for name in (UP, DOWN))
        return Matrices(up, a, b, self.scaling), Matrices(down, a_of_down, b_of_down, self.scaling_of_down)


def _forward(wrapper: Any, x: Tensor, *routes: Any, **options: Any) -> Tensor:
    """x: [tokens, hidden]; routes: each token's experts and their shares, both [tokens, top_k]. Where some of
    the experts are not here (is_part), these are called as the number of those that are.

    Under ZeRO-3, weights read here belong to this module, whose hooks gather them for the backward pass, too.
    """
    wrappers, experts = chain(wrapper), wrapper.get_base_layer()
    usual = len(routes) == 2 and not options and not (experts._forward_hooks or experts._forward_pre_hooks)
    if not usual or any(is_changed(one) for one in wrappers.values()):
        plain: Tensor = type(wrapper).forward(wrapper, x, *routes, **options)
        return plain
    weights: list[Tensor | None] = []
    for one in (wrappers.get(UP), wrappers.get(DOWN)):
        weights += [one.lora_A[ADAPTER].weight, one.lora_B[ADAPTER].weight] if one else [None, None]
    scaling = {name: float(one.scaling[ADAPTER]) for name, one in wrappers.items()}
    mixture = Mixture(experts, scaling.get(UP, 0.0), scaling.get(DOWN, 0.0))
    return _compute(x, routes, weights, mixture)


def without_lora(experts: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Compute transformers' module of experts. x: [tokens, hidden]; chosen, shares: [tokens, top_k].

    Source: transformers.integrations.moe.ExpertsInterface.
    """
    return _compute(x, (chosen, shares), [None] * 4, Mixture(experts, 0.0, 0.0))


def _compute(x: Tensor, routes: tuple[Any, ...], weights: list[Tensor | None], mixture: Mixture) -> Tensor:
    output: Tensor = _Experts.apply(x, *routes, *weights, mixture)  # type: ignore[no-untyped-call]
    return output


class _Experts(torch.autograd.Function):
    """Experts with LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, shares: Tensor, *rest: Any) -> Tensor:
        *weights, mixture = rest
        up, down = mixture.matrices(weights)
        experts, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(up.experts, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        if is_part(up.weight):  # what is not here comes last
            order = order[: int(ends[-1])]
        groups = Groups(ends, ends.tolist() if is_quantised(up.weight) else [])
        token_of, share = order // chosen.shape[1], shares.flatten()[order, None].to(up.dtype)
        gate_up, low_of_up = _project(up, x.to(up.dtype).index_select(0, token_of), groups)
        gate, second = gate_up.chunk(2, -1)
        output, low_of_down = _project(down, nn.functional.silu(gate).mul_(second), groups)
        ctx.mixture, ctx.ends = mixture, groups.numbers
        ctx.save_for_backward(x, shares, order, ends, gate_up, low_of_up, low_of_down, *weights)
        return sums(output.mul_(share), token_of, len(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, shares, order, ends, gate_up, low_of_up, low_of_down, *weights = ctx.saved_tensors
        up, down = ctx.mixture.matrices(weights)
        groups = Groups(ends, ctx.ends)
        token_of, dtype = order // shares.shape[1], gate_up.dtype
        share = shares.flatten()[order, None].to(dtype)
        gate, second = gate_up.chunk(2, -1)
        silu = nn.functional.silu(gate)
        rows, active = gradient.to(dtype).index_select(0, token_of), silu * second
        of_active, *of_down = _gradients(down, rows, active, low_of_down, groups, share)
        assert of_active is not None
        of_shares = torch.zeros_like(shares).view(-1)
        of_shares[order] = (of_active * active).sum(-1).to(shares.dtype)
        of_active.mul_(share)
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_second = of_gate_up.chunk(2, -1)
        torch.mul(of_active, silu, out=of_second)
        torch.ops.aten.silu_backward.grad_input(of_active.mul_(second), gate, grad_input=of_gate)
        rows, needed = x.to(dtype).index_select(0, token_of), ctx.needs_input_grad[0]
        of_rows, *of_up = _gradients(up, of_gate_up, rows, low_of_up, groups, needed=needed)
        of_x = sums(of_rows, token_of, len(x)).to(x.dtype) if of_rows is not None else None
        return of_x, None, of_shares.view(shares.shape), *of_up, *of_down, None
