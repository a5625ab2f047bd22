"""A base's weights, read by ranges: `BaseFiles` from safetensors, `WholeBase` from a loaded model. A rank
reads only the elements that it keeps of each tensor; spread/sharded_loading.py decides which."""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.base import pick_dtype, refuse_missing

# other dtypes (fp8) mean nothing without the scales beside them
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SLICE = 2**22  # numbers that are converted at a time


class Place(NamedTuple):
    """Where a tensor lies. offset: in bytes from the file's start."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class BaseFiles:
    """The safetensors files of a base, as a context manager that closes them; a base may have none.

    base: a folder, or a hub name, whose files are downloaded where the cache lacks them (never when
    HF_HUB_OFFLINE is set). places: where each tensor lies, by name. Raises: OSError when a file that the
    index names is neither there nor downloadable. Source: https://huggingface.co/docs/safetensors#format
    """

    def __init__(self, base: str, revision: str | None = None) -> None:
        self.places: dict[str, Place] = {}
        self.bytes_read = 0
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._open: dict[Path, FileIO] = {}
        for file in _files(base, revision):
            self.places |= _places(file)

    def __enter__(self) -> "BaseFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(math.prod(place.shape) * place.dtype.itemsize for place in self.places.values())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor: 1-D, in host memory, in the file's dtype."""
        values = torch.empty(stop - start, dtype=self.places[name].dtype)
        self.copy(name, start, values)
        return values

    def copy(self, name: str, start: int, to: Tensor) -> None:
        """Fill `to` (contiguous, any dtype and device) with a flattened tensor's elements from start on."""
        place, flat = self.places[name], to.view(-1)
        assert 0 <= start <= start + to.numel() <= math.prod(place.shape), (
            name,
            start,
            to.shape,
            place.shape,
        )
        if to.dtype == place.dtype and to.device.type == "cpu":
            self._fill(name, start, flat)
            return
        # one buffer: memory allocated for each read, between tensors that stay, would not return to the
        # system
        buffer = self._buffers.setdefault(place.dtype, torch.empty(0, dtype=place.dtype))
        if len(buffer) < min(SLICE, flat.numel()):
            self._buffers[place.dtype] = buffer = torch.empty(SLICE, dtype=place.dtype)
        for offset in range(0, flat.numel(), SLICE):
            part = flat[offset : offset + SLICE]
            self._fill(name, start + offset, buffer[: part.numel()])
            part.copy_(buffer[: part.numel()])

    def _fill(self, name: str, start: int, values: Tensor) -> None:
        """Read elements into host memory, and no other byte."""
        place = self.places[name]
        if place.file not in self._open:
            self._open[place.file] = FileIO(place.file)  # unbuffered: a buffer reads ahead
        file, unread = self._open[place.file], values.view(torch.uint8).numpy().data
        file.seek(place.offset + start * place.dtype.itemsize)
        while unread:  # one call reads 2 GB at most
            count = file.readinto(unread)
            if not count:
                raise ValueError(
                    f"{place.file} is cut short: {name} ends past its last byte; download it again"
                )
            unread = unread[count:]
        self.bytes_read += values.nbytes


def _files(base: str, revision: str | None) -> list[Path]:
    def path_of(name: str) -> str | None:
        return cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)  # type: ignore[no-any-return]

    single = path_of(SAFE_WEIGHTS_NAME)
    if single:
        return [Path(single)]
    index = path_of(SAFE_WEIGHTS_INDEX_NAME)
    if not index:
        return []
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(cached_file(base, name, revision=revision)) for name in names]


def _places(path: Path) -> dict[str, Place]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file, or cut short; download it again")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"])
        )
        for name, entry in header.items()
        if entry["dtype"] in DTYPES
    }


class WholeBase:
    """A base that transformers loads whole on the CPU, where its files do not match the parameters."""

    def __init__(self, config: Config, base: str) -> None:
        model: Any
        model, loading = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=pick_dtype(config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            output_loading_info=True,
        )
        refuse_missing(config, loading["missing_keys"])
        self.tensors: dict[str, Tensor] = model.state_dict()
        self.bytes_read = sum({t.data_ptr(): t.nbytes for t in self.tensors.values()}.values())

    def copy(self, name: str, start: int, to: Tensor) -> None:
        """Fill `to`, as BaseFiles.copy does."""
        to.view(-1).copy_(self.tensors[name].detach().flatten()[start : start + to.numel()])


WeightSource = BaseFiles | WholeBase


def peak_memory() -> int:
    """Return the most host memory, in bytes, that this process has used."""
    # not getrusage: its peak starts at that of the parent process
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
