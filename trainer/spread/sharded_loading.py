"""A base in parts: each rank reads only its own from the files.

`load_fsdp`, `load_zero3` and `load_divided` return the frozen model that model/loading.py's load_base returns
whole; the adapter comes on top. Of what is in parts, all ranks together read the base once (once for each
group of ranks that shares a base), and no rank has more in memory than its own and some megabytes.
"""

import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.base import hub_errors
from qwenlora.trainer.model.base_files import BaseFiles, peak_memory
from qwenlora.trainer.model.kinds import stacks
from qwenlora.trainer.model.loading import device, pick_dtype, refuse_misfits
from qwenlora.trainer.model.pretrained import load_config_of, read_config_of
from qwenlora.trainer.spread.zero import DeepSpeedConfig

log = logging.getLogger("qwenlora")


class Weight(NamedTuple):
    """A parameter with its names (a tied one has several), and the modules that hold it."""

    parameter: Any
    names: list[str]
    holders: list[tuple[nn.Module, str]]

    def substitute(self, new: nn.Parameter) -> nn.Parameter:
        """Put another parameter in its place."""
        for module, name in self.holders:
            setattr(module, name, new)
        return new


class WholeBase:
    """A base that transformers loads whole on the CPU, where its files do not match the parameters."""

    def __init__(self, config: Config, base: str) -> None:
        model: Any
        model, loading = class_of(read_config_of(config, base)).from_pretrained(
            base,
            dtype=pick_dtype(config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        refuse_misfits(config, loading)
        self.tensors: dict[str, Tensor] = model.state_dict()
        self.bytes_read = sum({t.data_ptr(): t.nbytes for t in self.tensors.values()}.values())

    def copy(self, name: str, start: int, to: Tensor) -> None:
        """Fill `to`, as BaseFiles.copy does."""
        to.view(-1).copy_(self.tensors[name].detach().flatten()[start : start + to.numel()])


Copy = Callable[[int, Tensor], None]  # fills a tensor with a flattened weight's elements, from a number on
# what transformers holds as one tensor for all experts, and files as some for each, which follow one another
OF_AN_EXPERT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# classes of experts whose matrices lie the other way round in Qwen's own files
TURNED_IN_FILES = ("Qwen3VLMoeTextExperts",)


def weights_of(model: nn.Module) -> list[Weight]:
    """Return the model's parameters, each once."""
    weights: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = weights.setdefault(id(parameter), Weight(parameter, [], []))
            weight.names.append(f"{prefix}.{name}" if prefix else name)
            weight.holders.append((module, name))
    return list(weights.values())


def skeleton(config: Config, base: str) -> Any:
    """Return the base without its weights: frozen parameters on torch's meta device, real buffers on the CPU.
    Raises: ValueError when its files are quantised: a range of such a file is not a range of the weight."""
    model_config = load_config_of(config, base, download=True)
    if getattr(model_config, "quantization_config", None):
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path} is quantised in its files, which cannot be"
            " sharded; name the model it was made from, or set strategy.name: ddp"
        )
    with init_empty_weights(include_buffers=False):
        model: Any = class_of(model_config).from_config(
            model_config,
            dtype=pick_dtype(config.model.dtype),
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
    model.tie_weights()  # the move to the meta device untied them
    return model.requires_grad_(False).eval()


def load_fsdp(config: Config, base: str, mesh: DeviceMesh) -> Any:
    """Return the base under FSDP2. mesh: [shards], or [replicas, shards], where each replica is a whole base.
    The adapter that is put on it is not sharded: it is whole on every rank, and FSDP2 does not reduce its
    gradients. Modules of lora.modules_to_save and lora.trainable_token_indices stay whole, too: peft copies
    them, or rows of them."""
    # Frozen weights have no gradients to reduce, so replicas need not know each other. The mesh has no names:
    # peft takes a named mesh for tensor parallelism, and would size LoRA's matrices for a part of each layer.
    mesh = DeviceMesh.from_group(mesh.get_group(mesh.ndim - 1), mesh.device_type)
    started = time.monotonic()
    to = torch.device("cpu") if config.strategy.offload == "params" else device()
    with hub_errors("model.name_or_path", config.model.name_or_path):
        model = skeleton(config, base)
        _move_buffers(model, device())
        _shard_by_fsdp(config, model, mesh)
        size, rank = mesh.size(), mesh.get_local_rank()

        def fill(weight: Weight, copy: Copy) -> None:
            parameter = weight.parameter
            if not isinstance(parameter, DTensor):
                values = torch.empty_like(parameter, device=device())
                copy(0, values)
                weight.substitute(nn.Parameter(values, requires_grad=False))
                return
            rows, row = parameter.shape[0], parameter.shape[1:]
            chunk = -(-rows // size)  # FSDP2 splits rows as torch.chunk does
            start, stop = (min(chunk * number, rows) for number in (rank, rank + 1))
            values = torch.empty(stop - start, *row, dtype=parameter.dtype, device=to)
            copy(start * row.numel(), values)
            shard = DTensor.from_local(
                values,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            weight.substitute(nn.Parameter(shard, requires_grad=False))

        _report(started, _fill(config, base, weights_of(model), fill))
    return model


def _shard_by_fsdp(config: Config, model: Any, mesh: DeviceMesh) -> None:
    """Put a skeleton under FSDP2: each decoder layer by itself, then everything outside of them."""
    offloaded = config.strategy.offload == "params"
    whole = _parameters_that_peft_copies(config, model)
    shard = partial(
        fully_shard,
        mesh=mesh,
        offload_policy=CPUOffloadPolicy() if offloaded else OffloadPolicy(),
        ignored_params=whole,
    )
    for layer in _layers(model):
        shard(layer)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not head.weight and embeddings.weight not in whole:
        shard(embeddings)  # else they would stay gathered for the whole step, with the head
    shard(model)


def load_zero3(config: Config, base: str, ds_config: DeepSpeedConfig) -> Any:
    """Return the base sharded by DeepSpeed's ZeRO-3. Its communication must have started. With
    zero_hpz_partition_size, DeepSpeed makes a node's own copy of a parameter when it first releases it."""
    import deepspeed

    started = time.monotonic()

    class Unsent(deepspeed.zero.Init):
        """Shards the base as Init does, but does not send rank 0's values first: there are none yet."""

        complete = False

        def _zero_init_param(self, param: Any) -> None:
            if self.complete:  # the adapter comes later, and all ranks get rank 0's
                super()._zero_init_param(param)
                return
            self._convert_to_deepspeed_param(param)
            self._partition_param(param)
            param.ds_status = type(param.ds_status).NOT_AVAILABLE

    def fill(weight: Weight, copy: Copy) -> None:
        shard = weight.parameter.ds_tensor
        start = min(shard.ds_numel * dist.get_rank(), weight.parameter.ds_numel)
        stop = min(start + shard.ds_numel, weight.parameter.ds_numel)
        copy(start, shard.data[: stop - start])
        shard.data[stop - start :].zero_()

    with hub_errors("model.name_or_path", config.model.name_or_path):
        model = skeleton(config, base)
        _move_buffers(model, device())
        weights, init = [], None
        for group in _groups(model):
            empty = [nn.Parameter(torch.empty_like(w.parameter, device=device()), False) for w in group]
            weights += [w._replace(parameter=w.substitute(new)) for w, new in zip(group, empty, strict=True)]
            if init is None:
                init = Unsent(module=nn.ParameterList(empty), config_dict_or_path=ds_config)
            else:  # not another Init: each makes process groups of its own
                weights[0].parameter.convert_to_zero_parameters(empty)
        assert init is not None
        init.complete = True
        _report(started, _fill(config, base, weights, fill))
    return model


def load_divided(config: Config, base: str, rank: int, size: int) -> Any:
    """Return the base with one of size parts of each layer's experts, and all else. rank: which part. These
    weights have the shape of the whole in ds_shape, where peft looks for it first, as ZeRO-3 has it."""
    started = time.monotonic()

    def fill(weight: Weight, copy: Copy) -> None:
        whole, parts = weight.parameter.shape, size if set(weight.names) & experts else 1
        values = torch.empty(whole[0] // parts, *whole[1:], dtype=weight.parameter.dtype, device=device())
        copy(values.numel() * (rank % parts), values)
        new: Any = weight.substitute(nn.Parameter(values, requires_grad=False))
        if parts > 1:
            new.ds_shape = whole

    with hub_errors("model.name_or_path", config.model.name_or_path):
        model = skeleton(config, base)
        experts = set(stacks(model))
        _move_buffers(model, device())
        _report(started, _fill(config, base, weights_of(model), fill))
    return model


def _layers(model: Any) -> list[nn.Module]:
    """Return the decoder's layers."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if layers:
        return layers
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def _groups(model: Any) -> list[list[Weight]]:
    """Return the parameters in groups: those of a decoder layer together, each other parameter by itself."""
    layer_of = {id(p): number for number, layer in enumerate(_layers(model)) for p in layer.parameters()}
    groups: dict[int, list[Weight]] = {}
    for weight in weights_of(model):
        key = id(weight.parameter)
        groups.setdefault(layer_of.get(key, key), []).append(weight)
    return list(groups.values())


def _parameters_that_peft_copies(config: Config, model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of lora.modules_to_save and of lora.trainable_token_indices."""
    # if empty, no name ends with it
    endings = (*(config.lora.modules_to_save or ()), *config.lora.trained_tokens)
    modules = [module for name, module in model.named_modules() if name.endswith(endings)]
    return {parameter for module in modules for parameter in module.parameters()}


def _move_buffers(model: nn.Module, to: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(to)


def _fill(config: Config, base: str, weights: list[Weight], fill: Callable[[Weight, Copy], None]) -> int:
    """Call fill with each parameter and what copies its values; return the bytes read."""
    with BaseFiles(base, config.model.revision) as files:
        sources = [source for source in (_source_of(files, weight) for weight in weights) if source]
        if len(sources) == len(weights):
            for weight, source in zip(weights, sources, strict=True):
                fill(weight, source)
            return files.bytes_read
    bytes_read = 0
    # one rank after the other, so that a node holds one whole base at a time
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        if turn == int(os.environ.get("LOCAL_RANK", "0")):
            whole = WholeBase(config, base)
            for weight in weights:
                fill(weight, partial(whole.copy, weight.names[0]))
            bytes_read = whole.bytes_read
            del whole
        dist.barrier()
    return bytes_read


def _source_of(files: BaseFiles, weight: Weight) -> Copy | None:
    """Return what copies a parameter's values from the files; None if they do not have it as it is."""
    shape = tuple(getattr(weight.parameter, "ds_shape", weight.parameter.shape))
    turned = type(weight.holders[0][0]).__name__ in TURNED_IN_FILES and (shape[0], *shape[:0:-1])
    for name in weight.names:
        # today's name, that of older files (Qwen2.5-VL's), and that of a text model in files of a full one
        older = name.replace("model.language_model.", "model.", 1)
        full = name.replace("model.", "model.language_model.", 1)
        for in_files in (name, older, full):
            stored = files.places[in_files].shape if in_files in files.places else None
            if stored == shape:
                return partial(_copy, files, [in_files])
            if turned and stored == turned:
                return partial(_copy_turned, files, in_files)
            if experts := _experts_in(files, in_files, shape):
                return partial(_copy, files, experts)
    return None


def _experts_in(files: BaseFiles, name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the matrices of experts in the files that transformers joins to one, in its order."""
    owner, _, last = name.rpartition(".")
    if not owner.endswith(".experts") or last not in OF_AN_EXPERT:
        return []
    names = [
        f"{owner}.{expert}.{matrix}.weight" for expert in range(shape[0]) for matrix in OF_AN_EXPERT[last]
    ]
    each = (shape[1] // len(OF_AN_EXPERT[last]), shape[2])
    fit = all(part in files.places and files.places[part].shape == each for part in names)
    return names if fit else []


def _copy(files: BaseFiles, names: list[str], start: int, to: Tensor) -> None:
    """Fill `to` with elements from start on of flattened tensors that follow one another."""
    flat = to.view(-1)
    for name in names:
        size = math.prod(files.places[name].shape)
        count = min(max(size - start, 0), flat.numel())
        if count:
            files.copy(name, start, flat[:count])
        flat, start = flat[count:], max(start - size, 0)


def _copy_turned(files: BaseFiles, name: str, start: int, to: Tensor) -> None:
    """As _copy, from a tensor whose matrices lie the other way round in the files."""
    flat, (_, rows, columns) = to.view(-1), files.places[name].shape
    size = rows * columns
    while flat.numel():
        matrix, skipped = divmod(start, size)
        count = min(size - skipped, flat.numel())
        values = files.read(name, matrix * size, (matrix + 1) * size).view(rows, columns).t().flatten()
        flat[:count].copy_(values[skipped : skipped + count])
        flat, start = flat[count:], start + count


def _report(started: float, bytes_read: int) -> None:
    log.info(
        "base loaded in %.1f s: %.2f GB read by this process; the most host memory that it has used is %.2f"
        " GB",
        time.monotonic() - started,
        bytes_read / 1e9,
        peak_memory() / 1e9,
    )
