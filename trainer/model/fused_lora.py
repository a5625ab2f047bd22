"""Linear layers with LoRA, and MLPs of them, each one function for autograd.

They compute what peft and transformers compute, with fewer operations, and keep less for the backward pass: a
layer's input, once, and its low-rank products; of an MLP the outputs of gate and up, too. What is
element-wise is made again. LoRA runs in the base's dtype where that is bfloat16 or float16, without a float32
copy of its input; its gradients are float32.

`fuse_lora` decides for each module; what it does not know keeps its own way: DoRA, biases that are trained,
several adapters, bases of unknown kinds. LoRA on the experts of a mixture: fused_experts.py.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from qwenlora.trainer.model.fused_norm import Kept, input_of, kept_for

# transformers' classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x))
MLPS = (
    "Qwen2MLP",
    "Qwen3MLP",
    "Qwen2MoeMLP",
    "Qwen3MoeMLP",
    "Qwen3NextMLP",
    "Qwen3_5MLP",
    "Qwen3_5MoeMLP",
    "Qwen3VLTextMLP",
    "Qwen3VLMoeTextMLP",
    "LlamaMLP",
    "MistralMLP",
)
ADAPTER = "default"  # peft's name for the adapter that is trained
INITIAL = "initial"  # and ours for its beginning, which is subtracted (initial.py)
ADAPTERS = ([ADAPTER], [ADAPTER, INITIAL])
IN_4_BITS, IN_8_BITS = "Linear4bit", "Linear8bitLt"  # bitsandbytes' classes, and peft's over them
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, A and B


def fuse_lora(model: Any) -> tuple[int, int, int]:
    """Fuse layers and MLPs of a peft model; what is frozen now must stay so. Return how many layers, how many
    MLPs, and how many layers with LoRA keep peft's way. Not for a base under ZeRO-3."""
    with_lora = [module for module in model.modules() if getattr(module, "lora_A", None)]
    layers = [module for module in with_lora if not isinstance(module, ParamWrapper)]
    fusible = [layer for layer in layers if _is_fusible(layer)]
    for layer in fusible:
        layer.forward = MethodType(_linear_forward, layer)
    mlps = [module for module in model.modules() if _is_fusible_mlp(module, fusible)]
    for mlp in mlps:
        mlp.forward = MethodType(_mlp_forward, mlp)
    return len(fusible), len(mlps), len(layers) - len(fusible)


def _is_fusible(layer: Any) -> bool:
    kind = type(layer)
    return (
        kind.__module__.startswith("peft.")
        and kind.__name__ in ("Linear", IN_4_BITS, IN_8_BITS)
        and list(layer.lora_A) in ADAPTERS
        and not layer.lora_variant  # DoRA and others
        and layer.lora_B[ADAPTER].bias is None
        and not getattr(layer, "fan_in_fan_out", False)
        and _is_known(layer.base_layer)
    )


def _is_fusible_mlp(module: Any, fusible: list[Any]) -> bool:
    if type(module).__name__ not in MLPS or type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    fused = {id(layer) for layer in fusible}
    linears = (module.gate_proj, module.up_proj, module.down_proj)
    return all(id(linear) in fused or _is_known(linear) for linear in linears)


def _is_known(base: Any) -> bool:
    """Whether a layer is frozen, of a known kind, and computes by its class's own forward."""
    if "forward" in vars(base) or any(parameter.requires_grad for parameter in base.parameters()):
        return False
    if type(base) is not nn.Linear:
        return type(base).__name__ in (IN_4_BITS, IN_8_BITS)
    plain = type(base.weight) in (nn.Parameter, DTensor)  # no packed numbers of a library
    return plain and base.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def weight_of(base: Any, dtype: torch.dtype) -> Tensor:
    """Return a base layer's weight, [out, in], as bitsandbytes' own backward passes make it."""
    if type(base).__name__ == IN_4_BITS:
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)
    elif type(base).__name__ == IN_8_BITS:
        scale = base.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        dense = base.state.CB.to(dtype, copy=True).mul_(scale)
    else:
        dense = base.weight.to(dtype)
    return dense


# ---- one linear layer, as plain computations


class Pair(NamedTuple):
    """A LoRA's weights, A [r, in] and B [out, r]; both None for a layer without."""

    a: Tensor | None = None
    b: Tensor | None = None


class Projection(NamedTuple):
    """A linear layer: its base, and the scaling and the dropout of its LoRA. initial: the LoRA's beginning,
    which is frozen, and subtracted; it has no dropout."""

    base: Any
    scaling: float = 0.0
    dropout: float = 0.0
    initial: Pair = Pair()


class Low(NamedTuple):
    """What the backward pass needs of a LoRA: its product x A^T, [tokens, r], and the mask of its
    dropout."""

    product: Tensor | None = None
    mask: Tensor | None = None


def projection_of(layer: Any) -> tuple[Projection, Pair]:
    """Return how a linear layer, with or without LoRA, computes now."""
    if not hasattr(layer, "lora_A"):
        return Projection(layer), Pair()
    rate = float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0)) if layer.training else 0.0
    pair, initial = (_pair_of(layer, adapter) for adapter in (ADAPTER, INITIAL))
    return Projection(layer.base_layer, float(layer.scaling[ADAPTER]), rate, initial), pair


def _pair_of(layer: Any, adapter: str) -> Pair:
    if adapter not in layer.active_adapters or adapter not in layer.lora_A:
        return Pair()
    return Pair(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)


def _project(layer: Projection, x: Tensor, pair: Pair) -> tuple[Tensor, Low]:
    output: Tensor = layer.base(x)
    if pair.a is None or pair.b is None:
        return output, Low()
    dropped, mask = torch.native_dropout(x, layer.dropout, True) if layer.dropout else (x, None)
    low, b = dropped.to(output.dtype).mm(pair.a.to(output.dtype).t()), pair.b.to(output.dtype)
    lows, initial = low, layer.initial
    if initial.a is not None and initial.b is not None:  # in one product: what is near to zero is not rounded
        lows = torch.cat((low, x.to(output.dtype).mm(initial.a.to(output.dtype).t())), 1)
        b = torch.cat((b, -initial.b.to(output.dtype)), 1)
    return output.addmm_(lows, b.t(), alpha=layer.scaling), Low(low, mask)


def _gradients(
    layer: Projection, gradient: Tensor, x: Tensor, pair: Pair, low: Low, onto: Tensor | None, needed: bool
) -> _Gradients:
    """Return the gradients of x, A and B. onto: a gradient of x from elsewhere, which this one is added to;
    needed: whether that of x is."""
    if needed:
        weight = weight_of(layer.base, gradient.dtype)
        onto = gradient.mm(weight) if onto is None else onto.addmm_(gradient, weight)
        onto = _subtract_initial(layer, gradient, onto)
    if pair.a is None or pair.b is None or low.product is None:
        return onto, None, None
    a, b, scaling = pair.a.to(gradient.dtype), pair.b.to(gradient.dtype), layer.scaling
    below, keep = gradient.mm(b), 1.0 - layer.dropout
    dropped = x if low.mask is None else x * low.mask / keep
    # with beta 0, the first argument only gives shape and dtype
    of_b = torch.addmm(b, gradient.t(), low.product, beta=0, alpha=scaling)
    of_a = torch.addmm(a, below.t(), dropped, beta=0, alpha=scaling)
    if onto is not None and low.mask is None:
        onto.addmm_(below, a, alpha=scaling)
    elif onto is not None and low.mask is not None:
        onto.add_(below.mm(a) * low.mask, alpha=scaling / keep)
    return onto, of_a.to(pair.a.dtype), of_b.to(pair.b.dtype)


def _subtract_initial(layer: Projection, gradient: Tensor, onto: Tensor) -> Tensor:
    a, b = layer.initial
    if a is None or b is None:
        return onto
    return onto.addmm_(gradient.mm(b.to(gradient.dtype)), a.to(gradient.dtype), alpha=-layer.scaling)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(output: Tensor, x: Tensor) -> Tensor:
    """Return an output, [tokens, out], in the shape of its input. It is no view for autograd, so that others
    may change it in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])
    return shaped


def _in_base_dtype(x: Tensor) -> Tensor:
    """Return the input as the base's layer sees it: under autocast, in its dtype."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# ---- as functions for autograd


def _linear_forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    if is_changed(layer, args, options):
        plain: Tensor = type(layer).forward(layer, x, *args, **options)
        return plain
    projection, pair = projection_of(layer)
    output: Tensor = _Linear.apply(x, *pair, projection, kept_for(x))  # type: ignore[no-untyped-call]
    return output


def is_changed(layer: Any, args: Any = (), options: Any = None) -> bool:
    """Whether the adapter is off or merged, or the call is unusual: peft then knows what to do."""
    return bool(
        args or options or layer.disable_adapters or layer.merged or layer.active_adapters not in ADAPTERS
    )


def _has_hooks(linear: Any) -> bool:
    return bool(linear._forward_pre_hooks or linear._forward_hooks)


class _Linear(torch.autograd.Function):
    """A linear layer with LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Projection, kept: Kept | None) -> Tensor:
        flat = _flat(_in_base_dtype(x))
        output, low = _project(layer, flat, Pair(a, b))
        ctx.layer, ctx.norm, ctx.dtype = layer, kept and kept.norm, flat.dtype
        ctx.save_for_backward(a, b, *low, *(kept.tensors if kept else (x,)))
        return _shaped(output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, product, mask, *rest = ctx.saved_tensors
        x = input_of(ctx.norm, rest)
        flat = _flat(x).to(ctx.dtype)
        needed = ctx.needs_input_grad[0]
        of_x, of_a, of_b = _gradients(
            ctx.layer, _flat(gradient), flat, Pair(a, b), Low(product, mask), None, needed
        )
        return (of_x.view(x.shape).to(x.dtype) if of_x is not None else None, of_a, of_b, None, None)


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if any(_has_hooks(linear) or (hasattr(linear, "lora_A") and is_changed(linear)) for linear in linears):
        plain: Tensor = type(mlp).forward(mlp, x)
        return plain
    layers, pairs = zip(*(projection_of(linear) for linear in linears), strict=True)
    weights = [weight for pair in pairs for weight in pair]
    output: Tensor = _Mlp.apply(x, *weights, layers, kept_for(x))  # type: ignore[no-untyped-call]
    return output


class _Mlp(torch.autograd.Function):
    """An MLP, down(silu(gate(x)) * up(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *weights, layers, kept = rest
        pairs = _pairs(weights)
        flat = _flat(_in_base_dtype(x))
        gate, low_of_gate = _project(layers[0], flat, pairs[0])
        up, low_of_up = _project(layers[1], flat, pairs[1])
        output, low_of_down = _project(layers[2], nn.functional.silu(gate).mul_(up), pairs[2])
        ctx.layers, ctx.norm, ctx.dtype = layers, kept and kept.norm, flat.dtype
        lows = (*low_of_gate, *low_of_up, *low_of_down)
        ctx.save_for_backward(gate, up, *weights, *lows, *(kept.tensors if kept else (x,)))
        return _shaped(output, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up, *rest = ctx.saved_tensors
        pairs, lows = _pairs(rest[:6]), [Low(*rest[i : i + 2]) for i in (6, 8, 10)]
        x = input_of(ctx.norm, rest[12:])
        flat = _flat(x).to(ctx.dtype)
        active = nn.functional.silu(gate)
        of_product, *of_down = _gradients(
            ctx.layers[2], _flat(gradient), active * up, pairs[2], lows[2], None, True
        )
        assert of_product is not None
        of_up = of_product * active
        of_gate = torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        needed = ctx.needs_input_grad[0]
        of_x, *ups = _gradients(ctx.layers[1], of_up, flat, pairs[1], lows[1], None, needed)
        of_x, *gates = _gradients(ctx.layers[0], of_gate, flat, pairs[0], lows[0], of_x, needed)
        of_x = of_x.view(x.shape).to(x.dtype) if of_x is not None else None
        return (of_x, *gates, *ups, *of_down, None, None)


def _pairs(weights: Any) -> list[Pair]:
    return [Pair(*weights[i : i + 2]) for i in (0, 2, 4)]
