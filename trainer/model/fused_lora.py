"""Linear layers with LoRA, and MLPs of them, each one function for autograd.

They compute what peft and transformers compute, with fewer operations, and keep less for the backward pass: a
layer's input, once, and its low-rank products; of an MLP the outputs of gate and up, too. What is
element-wise is made again. LoRA runs in the base's dtype where that is bfloat16 or float16, without a float32
copy of its input; its gradients are float32.

`fuse_lora` decides for each module; what it does not know keeps its own way: DoRA, biases that are trained,
several adapters, bases of unknown kinds.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwenlora.trainer.model.fused_norm import input_of, kept_for

# transformers' classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x))
MLPS = ("Qwen2MLP", "Qwen3MLP", "Qwen2MoeMLP", "Qwen3MoeMLP", "LlamaMLP", "MistralMLP")
ADAPTER = "default"  # peft's name for the only adapter
# a linear layer's own tensors for autograd: x, A, B
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def fuse_lora(model: Any) -> tuple[int, int, int]:
    """Fuse layers and MLPs of a peft model. Return how many layers, how many MLPs, and how many layers with
    LoRA keep peft's way. Not for a base under ZeRO-3."""
    layers = [
        module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")
    ]
    layers = [layer for layer in layers if isinstance(getattr(layer, "base_layer", None), nn.Linear)]
    fusible = [layer for layer in layers if _is_fusible(layer)]
    for layer in fusible:
        layer.forward = MethodType(_linear_forward, layer)
    mlps = [module for module in model.modules() if _is_fusible_mlp(module, fusible)]
    for mlp in mlps:
        mlp.forward = MethodType(_mlp_forward, mlp)
    return len(fusible), len(mlps), len(layers) - len(fusible)


def _is_fusible(layer: Any) -> bool:
    return (
        list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant  # DoRA and others
        and layer.lora_B[ADAPTER].bias is None
        and not getattr(layer, "fan_in_fan_out", False)
        and _weight_of(layer) is not None
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _is_fusible_mlp(module: Any, fusible: list[Any]) -> bool:
    if type(module).__name__ not in MLPS or type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    known = {id(layer) for layer in fusible}
    linears = (module.gate_proj, module.up_proj, module.down_proj)
    return all(id(linear) in known or _is_frozen(linear) for linear in linears)


def _is_frozen(linear: Any) -> bool:
    """Whether a layer without LoRA is of a known kind, and nothing of it is trained."""
    return (
        not hasattr(linear, "lora_A")
        and _weight_of(linear) is not None
        and not any(parameter.requires_grad for parameter in linear.parameters())
    )


def _weight_of(layer: Any) -> Callable[[torch.dtype], Tensor] | None:
    """Return a function that makes a layer's base weight, [out, in], in a dtype; None for unknown kinds."""
    base = getattr(layer, "base_layer", layer)
    if type(base) is nn.Linear:
        return lambda dtype: base.weight.to(dtype)
    return {"Linear4bit": _weight_of_4_bits(base), "Linear8bitLt": _weight_of_8_bits(base)}.get(
        type(base).__name__
    )


def _weight_of_4_bits(base: Any) -> Callable[[torch.dtype], Tensor]:
    def weight(dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(base.weight, base.weight.quant_state).to(dtype)
        return dense

    return weight


def _weight_of_8_bits(base: Any) -> Callable[[torch.dtype], Tensor]:
    def weight(dtype: torch.dtype) -> Tensor:
        scale = base.state.SCB.unsqueeze(1).mul(1.0 / 127.0)  # as bitsandbytes' own backward pass
        dense: Tensor = base.state.CB.to(dtype, copy=True).mul_(scale)
        return dense

    return weight


# ---- one linear layer, as plain computations


class Projection(NamedTuple):
    """A linear layer. run: its base's own forward, [tokens, in] -> [tokens, out]; weight: makes the base's
    weight; scaling, dropout: of its LoRA."""

    run: Callable[[Tensor], Tensor]
    weight: Callable[[torch.dtype], Tensor]
    scaling: float
    dropout: float


class Pair(NamedTuple):
    """A LoRA's weights, A [r, in] and B [out, r]; both None for a layer without."""

    a: Tensor | None
    b: Tensor | None


class Low(NamedTuple):
    """What the backward pass needs of a LoRA: its product x A^T, [tokens, r], and the mask of its
    dropout."""

    product: Tensor | None
    mask: Tensor | None


def projection_of(layer: Any) -> tuple[Projection, Pair]:
    """Return how a linear layer, with or without LoRA, computes now."""
    weight = _weight_of(layer)
    assert weight is not None, type(layer)
    if not hasattr(layer, "lora_A"):
        return Projection(layer, weight, 0.0, 0.0), Pair(None, None)
    dropout = layer.lora_dropout[ADAPTER]
    rate = float(getattr(dropout, "p", 0.0)) if layer.training else 0.0
    pair = Pair(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    return Projection(layer.base_layer, weight, float(layer.scaling[ADAPTER]), rate), pair


def _project(layer: Projection, x: Tensor, pair: Pair) -> tuple[Tensor, Low]:
    output = layer.run(x)
    if pair.a is None or pair.b is None:
        return output, Low(None, None)
    dropped, mask = torch.native_dropout(x, layer.dropout, True) if layer.dropout else (x, None)
    low = dropped.to(output.dtype).mm(pair.a.to(output.dtype).t())
    return output.addmm_(low, pair.b.to(output.dtype).t(), alpha=layer.scaling), Low(low, mask)


def _gradients(
    layer: Projection, gradient: Tensor, x: Tensor, pair: Pair, low: Low, onto: Tensor | None, needed: bool
) -> _Gradients:
    """Return the gradients of x, A and B. onto: a gradient of x from elsewhere, which this one is added to;
    needed: whether that of x is."""
    weight = layer.weight(gradient.dtype) if needed else None
    if weight is not None:
        onto = gradient.mm(weight) if onto is None else onto.addmm_(gradient, weight)
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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _in_base_dtype(x: Tensor) -> Tensor:
    """Return the input as the base's layer sees it: under autocast, in its dtype."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# ---- as functions for autograd


def _linear_forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    if _is_changed(layer, args, options):
        plain: Tensor = type(layer).forward(layer, x, *args, **options)
        return plain
    projection, pair = projection_of(layer)
    output: Tensor = _Linear.apply(x, *pair, projection, kept_for(x))  # type: ignore[no-untyped-call]
    return output


def _is_changed(layer: Any, args: Any = (), options: Any = None) -> bool:
    """Whether the adapter is off or merged, or the call is unusual: peft then knows what to do."""
    return bool(
        args or options or layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]
    )


class _Linear(torch.autograd.Function):
    """A linear layer with LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Projection, kept: Any) -> Tensor:
        flat = _flat(_in_base_dtype(x))
        output, low = _project(layer, flat, Pair(a, b))
        ctx.layer, ctx.norm, ctx.dtype = layer, kept and kept.norm, flat.dtype
        ctx.save_for_backward(a, b, *low, *(kept.tensors if kept else (x,)))
        return output.view(*x.shape[:-1], -1)

    @staticmethod
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
    if any(hasattr(linear, "lora_A") and _is_changed(linear) for linear in linears):
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
        return output.view(*x.shape[:-1], -1)

    @staticmethod
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
