"""Starts that take a part of the base away: pissa, pissa_niter_N, olora.

peft puts a part of each weight W into the adapter, s B A, and trains over W - s B A. Here W stays as it is.
Beside the adapter lies its own beginning, a second adapter of peft's that is frozen and subtracted:
W x + s (B A - B0 A0) x. So shards and 4 bits of W are as ever, and no rounding of W - s B0 A0 is added.

In files both are one adapter of twice the rank over the base as it is, which is how peft converts such
adapters. Every checkpoint holds the beginning, and a resume takes it from there.

Sources: https://arxiv.org/abs/2404.02948 (PiSSA), https://arxiv.org/abs/2406.01775 (OLoRA); peft's
LoraModel.subtract_mutated_init and PeftModel.save_pretrained.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import Linear as LinearWithLora
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwenlora.configs.schema import Lora
from qwenlora.plan.adapter import PATTERNS
from qwenlora.run import checkpoints
from qwenlora.trainer.model.fused_lora import ADAPTER, IN_4_BITS, IN_8_BITS, INITIAL
from qwenlora.trainer.model.loading import device
from qwenlora.trainer.model.names import names_in

Named = dict[str, Tensor]
Matrices = tuple[Tensor, Tensor]  # A [r, in] and B [out, r], in float32


def check(model: Any, lora: Lora) -> None:
    """Refuse layers that peft cannot begin so. model: a PeftModel, on any device. Raises: ValueError."""
    setting = f"lora.init_lora_weights={lora.init_lora_weights}"
    for name, layer in _layers(model):
        # eva sees what the decoder computes, which the head is no part of
        head = lora.init_lora_weights == "eva" and layer is model.get_output_embeddings()
        if type(layer).__name__ not in ("Linear", IN_4_BITS, IN_8_BITS) or head:
            raise ValueError(
                f"{setting} is for linear layers of the decoder, and {name} is none; leave it out of"
                " lora.target_modules (experts: set lora.experts: shared), or set it to gaussian"
            )
        smaller = min(layer.in_features, layer.out_features)
        if layer.r[ADAPTER] > smaller:
            raise ValueError(
                f"{setting}: the rank {layer.r[ADAPTER]} is more than {name} has, {smaller}; set lora.r, or"
                " for this layer lora.rank_pattern, to less"
            )


def begin(model: Any, lora: Lora, saved: Path | None, beat: Callable[[], None]) -> None:
    """Begin the adapter of a PeftModel, and put its beginning beside it; all ranks call it. saved: the
    checkpoint that the run goes on from, which has the beginning; beat: is called for each layer, which may
    take minutes."""
    settings = LoraConfig(use_rslora=lora.use_rslora, init_lora_weights=False)
    layers = _layers(model)
    for _, layer in layers:
        layer.update_layer(INITIAL, layer.r[ADAPTER], -layer.lora_alpha[ADAPTER], settings)
        layer.set_adapter([ADAPTER, INITIAL])
        for held in (layer.lora_A, layer.lora_B):
            held[INITIAL].requires_grad_(requires_grad=False)
    model.peft_config[INITIAL] = settings  # whose tensors peft then knows from those of the trained one
    for key in ("r", "lora_alpha", *PATTERNS):  # peft writes this one to files
        setattr(model.peft_config[ADAPTER], key, getattr(lora.in_files, key))
    if model.device.type == "meta":
        return
    pairs = _saved_pairs(model, layers, saved) if saved else _new_pairs([one for _, one in layers], lora)
    for (_, layer), pair in zip(layers, pairs, strict=True):
        for held, values in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            for adapter in (ADAPTER, INITIAL):
                held[adapter].weight.data = values.to(held[adapter].weight.device, copy=True)
        beat()


def over_base(model: Any, adapter: Named) -> Named:
    """Return an adapter as plain LoRA over the base as it is, [A; A0] and [B, -B0]: as peft's function, which
    fails where rows of embeddings are trained, too. adapter: by the names in peft's files."""
    whole = dict(adapter)
    for name, beginning in model.named_parameters():
        if (part := f".{INITIAL}.") in name:
            in_file = name.replace(part, ".")
            is_a = "lora_A" in in_file
            pair = (adapter[in_file], beginning.detach() if is_a else -beginning.detach())
            whole[in_file] = torch.cat(pair, 0 if is_a else 1)
    return whole


def without_beginning(model: Any, adapter: Named, own: Named, file: Path) -> Named:
    """Return what over_base() was given. own: the model's adapter, as in files; file: for the message.
    Raises: ValueError when the adapter has another beginning than the model."""
    if INITIAL not in model.peft_config:
        return adapter
    for name, values in adapter.items():
        if "lora_" in name and not torch.equal(_half(name, values, 1), _half(name, own[name], 1).cpu()):
            raise ValueError(
                f"{file} does not fit the model: {name} began there with other numbers than here, so it is of"
                " another run; move it out of the run folder"
            )
    return {name: _half(name, values, 0) for name, values in adapter.items()}


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _half(name: str, values: Tensor, which: int) -> Tensor:
    """Return a half of a tensor that over_base() made, 0: what is trained, 1: the beginning."""
    if "lora_A" in name or "lora_B" in name:
        return values.chunk(2, dim=0 if "lora_A" in name else 1)[which].contiguous()
    return values


def _saved_pairs(model: Any, layers: list[tuple[str, Any]], saved: Path) -> Iterator[Matrices]:
    tensors = names_in(model, load(checkpoints.content(saved, checkpoints.ADAPTER)))
    for name, layer in layers:
        a, b = (tensors.get(f"{name}.{of}.weight") for of in ("lora_A", "lora_B"))
        if a is None or b is None or (a.shape[0], b.shape[1]) != (2 * layer.r[ADAPTER],) * 2:
            raise ValueError(
                f"{saved} does not fit the model: it has no beginning of {name} of rank {layer.r[ADAPTER]};"
                " give lora the settings it was trained with, or --fresh to start anew"
            )
        yield _half("lora_A", a, 1), -_half("lora_B", b, 1)


def _new_pairs(layers: list[Any], lora: Lora) -> Iterator[Matrices]:
    """Yield A and B of each layer. Ranks share the work: each makes those of a layer in its turn, and sends
    them to the others, so that all have the same bits."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for first in range(0, len(layers), size):
        turns = layers[first : first + size]
        mine = None
        for turn, layer in enumerate(turns):
            weight = _whole_weight(layer.base_layer, wanted=turn == rank)
            mine = weight if turn == rank else mine
        made = None if mine is None else _made(turns[rank], mine, lora, first + rank)
        for turn, layer in enumerate(turns):
            pair = made if turn == rank and made else _zeros(layer)
            for values in pair if size > 1 else ():
                dist.broadcast(values, src=turn)
            yield pair


def _whole_weight(base: Any, *, wanted: bool) -> Tensor | None:
    """Return a copy of a layer's weight in float32 if it is wanted; all ranks call it: it may be sharded."""
    weight: Any = base.weight
    if type(weight.data) is DTensor:
        weight = weight.detach().to(device()).full_tensor()
    gathered: AbstractContextManager[Any] = nullcontext()
    if hasattr(weight, "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([weight])
    with gathered:
        if not wanted:
            return None
        if not weight.is_floating_point():
            weight = dequantize_module_weight(base)
        dense: Tensor = weight.detach().to(device(), torch.float32, copy=True)
        return dense


def _made(layer: Any, weight: Tensor, lora: Lora, number: int) -> Matrices:
    """Return A and B as peft begins them over a weight, which is spent. number: of the layer."""
    out, width = weight.shape
    base = nn.Linear(width, out, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    settings = LoraConfig(use_rslora=lora.use_rslora, init_lora_weights=lora.init_lora_weights)
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(torch.initial_seed() + number)  # by layer, so it matters not which rank makes it
        made = LinearWithLora(base, ADAPTER, settings, layer.r[ADAPTER], layer.lora_alpha[ADAPTER])
    a, b = (held[ADAPTER].weight.data.contiguous() for held in (made.lora_A, made.lora_B))
    return a, b


def _zeros(layer: Any) -> Matrices:
    r, to = layer.r[ADAPTER], device()
    return torch.zeros(r, layer.in_features, device=to), torch.zeros(layer.out_features, r, device=to)
