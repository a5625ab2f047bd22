"""A base's safetensors files, read by ranges: a rank reads only the elements that it keeps of each tensor, as
spread/sharded_loading.py decides."""

import math
import os
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qwenlora.trainer.model.headers import safetensors_of, stored_in

# of headers.FLOATS
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
    HF_HUB_OFFLINE is set; with local, none are read then). places: where each tensor lies, by name. Raises:
    OSError when a file that the index names is neither there nor downloadable. Source:
    https://huggingface.co/docs/safetensors#format
    """

    def __init__(self, base: str, revision: str | None = None, *, local: bool = False) -> None:
        self.places: dict[str, Place] = {}
        self.bytes_read = 0
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._open: dict[Path, FileIO] = {}
        for file in safetensors_of(base, revision, local=local):
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


def _places(path: Path) -> dict[str, Place]:
    return {
        each.name: Place(path, each.start, DTYPES[each.dtype], each.shape)
        for each in stored_in(path)
        if each.dtype in DTYPES
    }


def peak_memory() -> int:
    """Return the most host memory, in bytes, that this process has used."""
    # not getrusage: its peak starts at that of the parent process
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
