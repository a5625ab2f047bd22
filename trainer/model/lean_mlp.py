"""MLPs that keep less for the backward pass: the gate's and the up projection's outputs, from which the two
tensors between them and the down projection are made again. Only element-wise operations are repeated, so
gradients are the same to the bit."""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# transformers' classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x))
CLASSES = ("Qwen2MLP", "Qwen3MLP", "Qwen2MoeMLP", "Qwen3MoeMLP", "LlamaMLP", "MistralMLP")


def keep_less(model: Any) -> int:
    """Make a model's MLPs keep less; return how many there are. Not for a model with activation
    checkpointing, whose own hooks must see all tensors, nor for one under ZeRO-3, where a weight that is kept
    here would stay whole."""
    mlps = [module for module in model.modules() if type(module).__name__ in CLASSES]
    for mlp in mlps:
        mlp.forward = MethodType(_forward, mlp)
    return len(mlps)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    made = _Made(mlp.act_fn, gate.detach(), up.detach())
    with saved_tensors_hooks(made.pack, _unpack):
        made.activated = mlp.act_fn(gate)
        made.product = made.activated * up
        output: Tensor = mlp.down_proj(made.product)
    made.forget()
    return output


class _Made:
    """What an MLP makes between its projections, and how to make it again."""

    def __init__(self, act_fn: Any, gate: Tensor, up: Tensor) -> None:
        self._act_fn, self._gate, self._up = act_fn, gate, up
        self.activated: Tensor | None = None
        self.product: Tensor | None = None

    def forget(self) -> None:
        """Drop the tensors; from now on they are made again."""
        self.activated = self.product = None

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd keeps for a tensor: how to make it, if it is one of these, in whatever
        shape."""
        for name, again in (("product", self._product), ("activated", self._activated)):
            own = getattr(self, name)
            if own is not None and _same(tensor, own):
                return partial(_again, again, tensor.shape)
        return tensor

    def _activated(self) -> Tensor:
        activated: Tensor = self._act_fn(self._gate)
        return activated

    def _product(self) -> Tensor:
        return self._activated() * self._up


def _same(tensor: Tensor, own: Tensor) -> bool:
    """Whether both are the same numbers in memory, in the same order."""
    return (
        tensor.data_ptr() == own.data_ptr()
        and tensor.numel() == own.numel()
        and tensor.dtype == own.dtype
        and tensor.is_contiguous()
        and own.is_contiguous()
    )


def _again(make: Any, shape: torch.Size) -> Tensor:
    with torch.no_grad():
        made: Tensor = make().view(shape)
    return made


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept() if isinstance(kept, partial) else kept
    return tensor
