"""What a checkpoint holds of the model and the optimizer: taken as copies in host memory, put back by name.

All that is trained is float32, so the adapter's weights are what the optimizer goes on from (no second copy of them).
What the optimizer keeps of a parameter is saved under the parameter's name, whatever its groups and ranks are.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as load_safetensors
from torch import Tensor

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
    """Buffers that a snapshot is copied to, kept from one save to the next; page-locked where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors. They hold until the next call for this kind; sync() waits for all of them."""
        copies = {}
        for name, tensor in tensors.items():
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


def snapshot(model: Any, optimizer: torch.optim.Optimizer, memory: HostMemory) -> Snapshot:
    """Return copies of all that training changes. model: the PeftModel itself, not DDP's wrapper."""
    adapter = adapter_of(model)
    names = _names(model)
    state, groups = {}, []
    for group in optimizer.param_groups:
        kept = {key for key in group if key not in _FROM_CONFIG and group[key] != optimizer.defaults.get(key)}
        groups.append({key: group[key] for key in kept})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{names[parameter]}/{key}"] = torch.as_tensor(value)
    taken = memory.take("adapter", adapter), memory.take("optimizer", state)
    memory.sync()
    return Snapshot(*taken, groups)


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names in peft's files; everything that is trained is among them."""
    # "auto" would ask the hub whether the base's vocabulary has changed; modules_to_save are there in any case
    adapter: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in adapter.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    assert not lost, f"peft would not save {lost}"
    return adapter


def not_finite(adapter: dict[str, Tensor]) -> str:
    """Return the name of a tensor with NaN or infinite numbers; empty when there is none."""
    return next((name for name, tensor in sorted(adapter.items()) if not bool(tensor.isfinite().all())), "")


def restore_adapter(model: Any, content: bytes, checkpoint: Path) -> None:
    """Put a checkpoint's adapter into the model. Raises: ValueError when names or shapes are others."""
    saved, own = load_safetensors(content), adapter_of(model)
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own:
            has, lacks = ("the model", checkpoint.name) if name in own else (checkpoint.name, "the model")
            raise ValueError(
                f"{checkpoint} does not fit the model: {has} has {name}, {lacks} does not; give lora and model the"
                " settings it was trained with, or --fresh to start anew"
            )
        if saved[name].shape != own[name].shape:
            raise ValueError(
                f"{checkpoint} does not fit the model: {name} is {list(saved[name].shape)} there and"
                f" {list(own[name].shape)} here; give lora and model the settings it was trained with, or --fresh to"
                " start anew"
            )
    set_peft_model_state_dict(model, saved)
    for name, tensor in adapter_of(model).items():
        assert torch.equal(tensor.cpu(), saved[name]), f"{name} was not restored"


def restore_optimizer(model: Any, optimizer: torch.optim.Optimizer, content: bytes, groups: list[Any]) -> None:
    """Put a checkpoint's optimizer state back, by parameter name; learning rate and decay are the config's."""
    saved = load_safetensors(content)
    names = _names(model)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full, value in saved.items():
        name, _, key = full.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    packed = optimizer.state_dict()  # in which parameters are numbers
    packed["state"] = {}
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if values := by_parameter.pop(names[parameter], None):
                packed["state"][number] = values
            number += 1
    assert not by_parameter, f"the optimizer has no {sorted(by_parameter)}"
    for group, kept in zip(packed["param_groups"], groups, strict=True):
        group |= kept
    optimizer.load_state_dict(packed)


def _names(model: Any) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
