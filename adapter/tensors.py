"""Tensors of adapters between numpy and torch: for commands that compute with them, and for files that only
torch can read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qwenlora.trainer.model.headers import TensorValues


def load(file: Path) -> object:
    """Return what torch or safetensors reads of a file, on the CPU. Raises: whatever they raise."""
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True)
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)


def values_in(file: Path, loaded: object) -> dict[str, TensorValues]:
    """Return a loaded file's tensors. Raises: ValueError when it holds something else."""
    if not isinstance(loaded, Mapping) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise ValueError(f"{file} holds no tensors by name; expected what peft's save_pretrained writes")
    return {name: _values_of(tensor.detach()) for name, tensor in loaded.items()}


def _values_of(tensor: Tensor) -> TensorValues:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return TensorValues(name, tensor.numpy())
    except TypeError:  # a dtype that numpy lacks
        bits: torch.dtype = getattr(torch, f"uint{8 * tensor.dtype.itemsize}")
        return TensorValues(name, tensor.contiguous().view(bits).numpy())


def tensor_of(values: TensorValues) -> Tensor:
    """Return the tensor, copied."""
    dtype: torch.dtype = getattr(torch, values.dtype)
    return torch.from_numpy(values.raw.copy()).view(dtype)
