"""A checkpoint's tensors of model and optimizer: copied to host memory, restored by name.

All trained parameters are float32, so the adapter's file has the exact weights that the optimizer continues
from, and no second copy of them is needed. The optimizer's state is saved under the names of its parameters,
so it depends neither on the optimizer's groups nor on the number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as load_safetensors
from torch import Tensor

from qwenlora.trainer.model import initial
from qwenlora.trainer.model.names import names_in
from qwenlora.trainer.ranks.faults import TrainingFault, unlike_rank_0
from qwenlora.trainer.spread.zero import OptimizerState

# settings of an optimizer's group that come from the config and the schedule at each start
_FROM_CONFIG = {"params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay"}


GroupSettings = dict[str, object]  # of an optimizer's group, by torch's names


class Snapshot(NamedTuple):
    """Copies in host memory. adapter: by peft's names; optimizer: by `parameter/key`; groups: the settings of
    the optimizer's groups that training changes; most optimizers have none."""

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    groups: list[GroupSettings]


class HostMemory:
    """Buffers for snapshots, reused from save to save; page-locked where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return copies, valid until this kind's next call; those from a GPU are complete after sync()."""
        copies = {}
        for name, tensor in tensors:
            buffer = self._buffers.get(f"{kind} {name}")
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                pinned = tensor.is_cuda
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                self._buffers[f"{kind} {name}"] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def sync(self) -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (parameter's name, key, tensor) of the optimizer's state. model: the PeftModel, unwrapped."""
    names = _names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                yield names[parameter], key, torch.as_tensor(value)


def changed_settings(optimizer: torch.optim.Optimizer) -> list[GroupSettings]:
    """Return the settings that training changes, of each of the optimizer's groups that has parameters."""
    defaults = optimizer.defaults
    return [
        {key: group[key] for key in group if key not in _FROM_CONFIG and group[key] != defaults.get(key)}
        for group in optimizer.param_groups
        if group["params"]
    ]


def restore_settings(optimizer: torch.optim.Optimizer, saved: list[GroupSettings]) -> None:
    """Put back changed_settings(), except for groups without parameters: strategies differ in these."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    if any(saved):
        for group, settings in zip(groups, saved[: len(groups)], strict=True):
            group.update(settings)


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names in peft's files: all trained parameters."""
    # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are always included
    adapter: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in adapter.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    assert not lost, f"peft would not save {lost}"
    return adapter


def in_file(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors as they are in files: over the base as it is, whatever they began with."""
    return initial.over_base(model, adapter_of(model))


def names_in_file(model: Any) -> dict[str, str]:
    """Return {parameter's name: its name in peft's files} of all trained parameters, which must be whole."""
    by_address = {tensor.data_ptr(): name for name, tensor in adapter_of(model).items()}
    return {name: by_address[p.data_ptr()] for name, p in model.named_parameters() if p.requires_grad}


def check_alike(adapter: dict[str, Tensor], device: torch.device) -> None:
    """Compare the ranks' adapters. Raises: TrainingFault, on all, naming ranks that differ from rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = torch.zeros(3, dtype=torch.int64, device=device)
    for _, tensor in sorted(adapter.items()):
        bits = tensor.detach().contiguous().view(-1).view(torch.int32)  # all trained parameters are float32
        sums_of_bits = [bits[::stride].sum(dtype=torch.int64) for stride in (1, 7, 11)]
        mine = mine * 31 + torch.stack(sums_of_bits).to(device)
    if differing := unlike_rank_0(mine):
        raise TrainingFault(
            f"rank{'s' * (len(differing) > 1)} {', '.join(map(str, differing))} and rank 0 have different"
            " adapters, which must be the same: a GPU or its memory may be broken; no checkpoint was written"
        )


def not_finite(adapter: dict[str, Tensor]) -> str:
    """Return the name of a tensor with NaN or infinite numbers; empty when all are finite."""
    return next((name for name, tensor in sorted(adapter.items()) if not bool(tensor.isfinite().all())), "")


def check_fits(model: Any, content: bytes, checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's adapter, as adapter_of(). Raises: ValueError when its names, shapes or beginning
    are not the model's."""
    saved: dict[str, Tensor] = names_in(model, load_safetensors(content))
    own = in_file(model)
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own:
            has, lacks = ("the model", checkpoint.name) if name in own else (checkpoint.name, "the model")
            raise ValueError(
                f"{checkpoint} does not fit the model: {has} has {name}, {lacks} does not; give lora and"
                " model the settings it was trained with, or --fresh to start anew"
            )
        if saved[name].shape != own[name].shape:
            raise ValueError(
                f"{checkpoint} does not fit the model: {name} is {list(saved[name].shape)} there and"
                f" {list(own[name].shape)} here; give lora and model the settings it was trained with, or"
                " --fresh to start anew"
            )
    return initial.without_beginning(model, saved, own, checkpoint)


def restore_adapter(model: Any, content: bytes, checkpoint: Path) -> None:
    """Put a checkpoint's adapter into the model. Raises: ValueError when it does not fit."""
    saved = check_fits(model, content, checkpoint)
    set_peft_model_state_dict(model, saved)
    for name, tensor in adapter_of(model).items():
        assert torch.equal(tensor.cpu(), saved[name]), f"{name} was not restored"


def restore_optimizer(
    model: Any,
    optimizer: torch.optim.Optimizer,
    content: bytes,
    settings: list[GroupSettings],
    part_of: Callable[[str, Tensor], Tensor] = lambda _, values: values,
) -> None:
    """Put a checkpoint's optimizer state back by parameter name; rates and decay are the config's. part_of:
    returns what this rank has of a parameter's state, where ranks have parts."""
    names = _names(model)
    saved = {
        name: {key: part_of(name, value) for key, value in state.items()}
        for name, state in state_by_parameter(model, content).items()
    }
    packed = optimizer.state_dict()  # which has numbers in place of parameters
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {
        number: saved.pop(names[parameter])
        for number, parameter in enumerate(parameters)
        if names[parameter] in saved
    }
    assert not saved, f"the optimizer has no {sorted(saved)}"
    optimizer.load_state_dict(packed)
    restore_settings(optimizer, settings)


def state_by_parameter(model: Any, content: bytes) -> OptimizerState:
    """Return an optimizer's saved state."""
    state: OptimizerState = {}
    for full_name, value in names_in(model, load_safetensors(content)).items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(name, {})[key] = value
    return state


def _names(model: Any) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
