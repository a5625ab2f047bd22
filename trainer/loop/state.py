"""What a checkpoint holds of the model and the optimizer: taken as copies in host memory, put back by name.

All that is trained is float32, so the adapter's weights are what the optimizer goes on from (no second copy
of them). What the optimizer keeps of a parameter is saved under the parameter's name, whatever its groups and
ranks are.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as load_safetensors
from torch import Tensor

from qwenlora.trainer.ranks.faults import TrainingFault

# of an optimizer's group, what the config and the schedule decide anew at each start
_FROM_CONFIG = {"params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay"}


class Snapshot(NamedTuple):
    """Copies in host memory. adapter: by peft's names; optimizer: by `parameter/key`.

    groups: the settings of the optimizer's groups that training changes; most optimizers have none.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    groups: list[dict[str, Any]]


class HostMemory:
    """Buffers that a snapshot is copied to, kept from one save to the next; page-locked where there is a
    GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return copies of tensors. They hold until the next call for this kind; sync() waits for all of
        them."""
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
        """Wait until all copies are there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (parameter's name, key, what the optimizer keeps of it). model: the PeftModel itself, not a
    wrapper."""
    names = _names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                yield names[parameter], key, torch.as_tensor(value)


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of the optimizer's groups that training changes; those without parameters do not
    count."""
    groups = []
    for group in optimizer.param_groups:
        if group["params"]:
            kept = {
                key for key in group if key not in _FROM_CONFIG and group[key] != optimizer.defaults.get(key)
            }
            groups.append({key: group[key] for key in kept})
    return groups


def restore_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Put those settings back. A strategy or version may count groups without parameters, which have none."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    if any(saved):
        for group, kept in zip(groups, saved[: len(groups)], strict=True):
            group.update(kept)


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names in peft's files; everything that is trained is among them."""
    # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are there in any
    # case
    adapter: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in adapter.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    assert not lost, f"peft would not save {lost}"
    return adapter


def file_names(model: Any) -> dict[str, str]:
    """Return {parameter's name: its name in peft's files} of all that is trained, which must be whole."""
    by_place = {tensor.data_ptr(): name for name, tensor in adapter_of(model).items()}
    return {name: by_place[p.data_ptr()] for name, p in model.named_parameters() if p.requires_grad}


def by_parameter_name(content: bytes, names: dict[str, str]) -> dict[str, Tensor]:
    """Return an adapter's tensors by parameters' names. names: see file_names."""
    saved = load_safetensors(content)
    return {name: saved[in_file] for name, in_file in names.items()}


def check_alike(adapter: dict[str, Tensor], device: torch.device) -> None:
    """Make sure that all ranks hold the same adapter. Raises: TrainingFault, on all, naming a rank that does
    not."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = torch.zeros(3, dtype=torch.int64, device=device)
    for _, tensor in sorted(adapter.items()):
        bits = tensor.detach().contiguous().view(-1).view(torch.int32)  # float32's: all that is trained is
        sums = [bits[::every].sum(dtype=torch.int64) for every in (1, 7, 11)]
        mine = mine * 31 + torch.stack(sums).to(device)
    everyones = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    if others := [rank for rank, one in enumerate(everyones) if not torch.equal(one, everyones[0])]:
        raise TrainingFault(
            f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} and rank 0 have different adapters,"
            " which would be the same if all computed right: a GPU or its memory may be broken; no"
            " checkpoint was written"
        )


def not_finite(adapter: dict[str, Tensor]) -> str:
    """Return the name of a tensor with NaN or infinite numbers; empty when there is none."""
    return next((name for name, tensor in sorted(adapter.items()) if not bool(tensor.isfinite().all())), "")


def check_fits(model: Any, content: bytes, checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's adapter. Raises: ValueError when names or shapes are not the model's."""
    saved: dict[str, Tensor] = load_safetensors(content)
    own = adapter_of(model)
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
    return saved


def restore_adapter(model: Any, content: bytes, checkpoint: Path) -> None:
    """Put a checkpoint's adapter into the model. Raises: ValueError when names or shapes are others."""
    saved = check_fits(model, content, checkpoint)
    set_peft_model_state_dict(model, saved)
    for name, tensor in adapter_of(model).items():
        assert torch.equal(tensor.cpu(), saved[name]), f"{name} was not restored"


def restore_optimizer(
    model: Any, optimizer: torch.optim.Optimizer, content: bytes, groups: list[Any]
) -> None:
    """Put a checkpoint's optimizer state back, by parameter name; learning rate and decay are the
    config's."""
    names = _names(model)
    saved = by_parameter(content)
    packed = optimizer.state_dict()  # in which parameters are numbers
    packed["state"] = {}
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if values := saved.pop(names[parameter], None):
                packed["state"][number] = values
            number += 1
    assert not saved, f"the optimizer has no {sorted(saved)}"
    optimizer.load_state_dict(packed)
    restore_groups(optimizer, groups)


def by_parameter(content: bytes) -> dict[str, dict[str, Tensor]]:
    """Return an optimizer's saved state: {parameter's name: {key: whole tensor}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, value in load_safetensors(content).items():
        name, _, key = full.rpartition("/")
        found.setdefault(name, {})[key] = value
    return found


def _names(model: Any) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
