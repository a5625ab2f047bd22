"""A base's weights, read by tensor name and range; a merged model's, written in any order.

`SafetensorsWriter` writes slices as they come: safetensors' own writer needs a whole file in memory.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from qwenlora.trainer.model.base import hub_errors
from qwenlora.trainer.model.base_files import DTYPES, BaseFiles, Place

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OTHER_GRID = 1.3  # dividing by this moves numbers off their dtype's grid, so that they are rounded anew


class WeightFiles(Protocol):
    """Tensors in files, read by name: BaseFiles (trainer/model/base_files.py) or TorchFiles."""

    places: dict[str, Place]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor: 1-D, in host memory, in the file's dtype."""
        ...


class TorchFiles:
    """The pytorch_model*.bin files of a base, mapped into memory: pages are read when they are needed."""

    def __init__(self, base: str, revision: str | None) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.places: dict[str, Place] = {}
        for file in self._files(base, revision):
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"{file} cannot be read: {reason}; download it again") from None
            self._tensors |= tensors
            for name, values in tensors.items():
                if values.dtype in DTYPES.values():
                    self.places[name] = Place(file, 0, values.dtype, tuple(values.shape))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor: 1-D, in host memory, in the file's dtype."""
        return self._tensors[name].flatten()[start:stop]

    @staticmethod
    def _files(base: str, revision: str | None) -> list[Path]:
        def find(name: str) -> str | None:
            return cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)  # type: ignore[no-any-return]

        if single := find(WEIGHTS_NAME):
            return [Path(single)]
        if not (index := find(WEIGHTS_INDEX_NAME)):
            raise ValueError(
                f"{base} has no weights: neither model*.safetensors nor pytorch_model*.bin; download it again"
            )
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(cached_file(base, name, revision=revision)) for name in names]


@contextmanager
def open_weights(base: str, revision: str | None = None) -> Iterator[WeightFiles]:
    """Open the weights of a folder or hub name. Raises: ValueError when they are missing or broken."""
    with hub_errors("base", base):
        safetensors = BaseFiles(base, revision)
    with safetensors:
        if safetensors.places:
            yield safetensors
            return
        with hub_errors("base", base):
            files = TorchFiles(base, revision)
        yield files


def read_tensor(files: WeightFiles, name: str) -> Tensor:
    """Return a whole tensor, in the dtype that the files have."""
    shape = files.places[name].shape
    return files.read(name, 0, math.prod(shape)).view(shape)


class RoundedFiles:
    """Files with some tensors rounded once more: as coarsely as before, to other numbers (OTHER_GRID)."""

    def __init__(self, files: WeightFiles, names: set[str]) -> None:
        self.files, self.names, self.places = files, names, files.places

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor: 1-D, in host memory."""
        values = self.files.read(name, start, stop)
        if name not in self.names:
            return values
        return (values.float() / OTHER_GRID).to(values.dtype).float() * OTHER_GRID


def parse_size(text: str) -> int:
    """Return a --max-shard-size in bytes. Raises: ValueError when it is not a size."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0 or text.strip()[-1:] not in "bB":
        raise ValueError(f"--max-shard-size {text}: expected a size with its unit, as 5GB or 500MB")
    return size


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes model*.safetensors into a folder. Format: https://huggingface.co/docs/safetensors#format"""

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], max_shard_size: int) -> None:
        split = split_state_dict_into_shards_factory(
            specs,
            get_storage_size=lambda spec: spec.size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.files = sorted(split.filename_to_tensors)
        self.size = sum(spec.size for spec in specs.values())
        self.numbers = sum(math.prod(spec.shape) for spec in specs.values())
        self._specs, self._folder = specs, folder
        self._weight_map: dict[str, str] = split.tensor_to_filename if split.is_sharded else {}
        self._offsets: dict[str, tuple[int, int]] = {}  # {tensor: (file descriptor, position in it)}
        self._missing = {name: math.prod(spec.shape) for name, spec in specs.items()}
        self._open: list[int] = []
        for file in self.files:
            self._begin(folder / file, split.filename_to_tensors[file])

    def _begin(self, path: Path, names: list[str]) -> None:
        """Create a file of its final size, with its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in names:
            dtype, shape = self._specs[name]
            starts[name], end = end, end + self._specs[name].size
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [starts[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._open.append(descriptor)
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.truncate(descriptor, 8 + len(text) + end)
        self._offsets |= {name: (descriptor, 8 + len(text) + start) for name, start in starts.items()}

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write a flattened tensor from element start on. Raises: ValueError if not finite in its dtype."""
        dtype = self._specs[name].dtype
        values = values.to(dtype).contiguous()
        if not values.isfinite().all():
            raise ValueError(
                f"{name} would hold numbers that are not finite in {DTYPE_NAMES[dtype]}: broken in the files"
                " that are read, or too large for it (fp32 holds them)"
            )
        self._missing[name] -= values.numel()
        descriptor, offset = self._offsets[name]
        offset += start * dtype.itemsize
        rest = values.view(-1).view(torch.uint8).numpy().data
        while rest:  # one call writes 2 GB at most
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count

    def finish(self) -> None:
        """Write the index if there are several files. All tensors must have been written."""
        assert not any(self._missing.values()), [name for name, count in self._missing.items() if count]
        if self._weight_map:
            index = {"metadata": {"total_size": self.size}, "weight_map": self._weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
