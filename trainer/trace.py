"""One micro-batch of a model that is not there: it runs on fake tensors, which have shapes and no numbers.
Each allocation is followed, and each operation counted. So what a plan's formulas say can be compared with
the real model, adapter and functions, for a 72B in seconds and without its memory."""

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig

from qwenlora.configs.schema import Lora
from qwenlora.data.chunks import JsonObject
from qwenlora.trainer.loop.chunked_loss import summed_loss
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.loading import set_up
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.model.row_attention import attend_row_by_row
from qwenlora.trainer.model.row_states import keep_states_apart


class Traced(NamedTuple):
    """Bytes and operations of a micro-batch. weights: of base and adapter; kept: for the backward pass, with
    the gradient that the loss makes at once; peak: over the weights; gradients: of the adapter; flops: of
    forward and backward pass; seconds: of tracing."""

    weights: int
    kept: int
    peak: int
    gradients: int
    flops: int
    seconds: float = 0.0


def trace(
    values: JsonObject,
    lora: Lora,
    *,
    tokens: int,
    trained: int,
    recomputed: int = 0,
    sharded_by_deepspeed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Traced:
    """Return what a micro-batch takes. values: of the base's config.json; tokens: in one row; trained: how
    many of them are; recomputed, sharded_by_deepspeed: as in set_up() and fuse(). Raises: ValueError as a
    start would."""
    start = time.monotonic()
    with torch.device("meta"):
        base, model = build(values, lora, dtype, recomputed, sharded_by_deepspeed=sharded_by_deepspeed)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        return follow(base, model, tokens, trained)._replace(seconds=time.monotonic() - start)


def build(
    values: JsonObject,
    lora: Lora,
    dtype: torch.dtype,
    recomputed: int = 0,
    *,
    sharded_by_deepspeed: bool = False,
) -> tuple[Any, Any]:
    """Return a base of random weights, and it with its adapter."""
    config = AutoConfig.for_model(**values)
    return with_adapter(
        class_of(config).from_config(config, dtype=dtype),
        lora,
        recomputed,
        sharded_by_deepspeed=sharded_by_deepspeed,
    )


def with_adapter(
    base: Any, lora: Lora, recomputed: int = 0, *, sharded_by_deepspeed: bool = False
) -> tuple[Any, Any]:
    """Return a base, and it with its adapter, as trainer/build.py makes them."""
    set_up(base, recomputed)
    attend_row_by_row(base, states_apart=keep_states_apart(base))
    model = add_lora(base, lora)
    fuse(model, sharded_by_deepspeed=sharded_by_deepspeed)
    model.train()
    return base, model


def follow(base: Any, model: nn.Module, tokens: int, trained: int) -> Traced:
    """Return what a micro-batch takes, of real tensors or of fake ones."""
    memory = Allocations()
    for tensor in (*model.parameters(), *model.buffers()):
        memory.see(tensor)
    weights = memory.now
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with memory:
        with torch.autocast("cpu", base.dtype, enabled=base.dtype != torch.float32):  # as accelerate has it
            states = base.model(input_ids=ids).last_hidden_state
            # which positions are trained depends on data: here the first ones
            some, labels = states[0, :trained], ids[0, :trained]
            loss = summed_loss(base.get_output_embeddings(), some, labels, blocks=False)
            del some
        del states
        kept = memory.now - weights
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    return Traced(weights, kept, memory.peak - weights, gradients, memory.flops)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, until they are freed, and counts the operations. now, peak:
    bytes; flops: so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._known = WeakIdKeyDictionary()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, operation: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it makes."""
        made = operation(*args, **(kwargs or {}))
        # torch's counter of operations wants modules whose parameters all have gradients
        if of := _COUNTED.get(operation.overloadpacket):
            self.flops += of(*args, **(kwargs or {}), out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return made


def _make_fake(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones of the CPU; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _of_grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    # [rows, in] x [experts, in, out]; or [out, rows] x [rows, in], which makes [experts, out, in]
    return int(2 * left[0] * left[1] * right[-1])


def _of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    half = 2  # of the pairs: attention is causal
    return int(sdpa_flop_count(query, key, value) // half)  # type: ignore[no-untyped-call]


def _of_its_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value) // 2)  # type: ignore[no-untyped-call]


_OURS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: _of_grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_its_backward,
}
_COUNTED: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    **{operation: shape_wrapper(of) for operation, of in _OURS.items()},  # type: ignore[no-untyped-call]
}
