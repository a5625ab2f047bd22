"""The files of a base or an adapter, found and read without torch: headers of safetensors files, and their
numbers as numpy has them. Source: https://huggingface.co/docs/safetensors#format"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwenlora.trainer.hidden import hidden

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# other dtypes (fp8) mean nothing without the scales beside them
FLOATS = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "F16": "<f2"}  # as numpy's; it has no bfloat16


class Stored(NamedTuple):
    """A tensor, as its file's header says. dtype: safetensors' name; [start, stop): bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def stored_in(path: Path) -> list[Stored]:
    """Return what a safetensors file's header says. Raises: ValueError when it has none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(length)) if length <= path.stat().st_size else None
        header.pop("__metadata__", None)
        return [
            Stored(name, each["dtype"], tuple(each["shape"]), *(8 + length + i for i in each["data_offsets"]))
            for name, each in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no safetensors file, or cut short; download it again") from None


class TensorValues(NamedTuple):
    """A tensor in host memory or in a mapped file. dtype: as torch calls it; raw: in the tensor's shape, for
    bfloat16 its bits."""

    dtype: str
    raw: npt.NDArray[Any]

    def part(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return elements [start, stop) of the flattened tensor, bfloat16 as float32."""
        bits = self.raw.reshape(-1)[start:stop]
        if self.dtype != "bfloat16":
            return bits
        return (bits.astype(np.uint32) << 16).view(np.float32)

    @property
    def numbers(self) -> npt.NDArray[Any]:
        """All elements, flattened."""
        return self.part(0, self.raw.size)


def mapped(path: Path) -> dict[str, TensorValues]:
    """Return a safetensors file's tensors by name, those that are FLOATS. Their pages are read when they are
    needed. Raises: ValueError when the file is cut short."""
    data, found = np.memmap(path, np.uint8, "r"), {}
    for name, dtype, shape, start, stop in stored_in(path):
        if dtype not in FLOATS:
            continue
        if stop > len(data):
            raise ValueError(f"{path} is cut short: {name} ends past its last byte; download it again")
        raw = data[start:stop].view(FLOATS[dtype]).reshape(shape)
        found[name] = TensorValues("bfloat16" if dtype == "BF16" else raw.dtype.name, raw)
    return found


def find_file(
    base: str, name: str, *, revision: str | None = None, local: bool = False, optional: bool = False
) -> Path | None:
    """Return a file of a folder or a hub's model. local: only from the hub's cache, and never mind the hub.
    Raises: OSError when it is missing, and not optional."""
    if (file := Path(base) / name).is_file():
        return file
    if optional and Path(base).is_dir():
        return None
    with hidden():  # transformers takes a second, and a folder's files do without
        from transformers.utils import cached_file
    found = cached_file(
        base,
        name,
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=not optional,
        _raise_exceptions_for_connection_errors=not local,
    )
    return Path(found) if found else None


def safetensors_of(base: str, revision: str | None = None, *, local: bool = False) -> list[Path]:
    """Return a base's safetensors files; a base may have none. local: as find_file's; none, if the cache
    lacks one. Raises: OSError when a file that the index names is neither there nor downloadable."""
    if single := find_file(base, WEIGHTS, revision=revision, local=local, optional=True):
        return [single]
    index = find_file(base, INDEX, revision=revision, local=local, optional=True)
    if not index:
        return []
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    files = [find_file(base, name, revision=revision, local=local, optional=local) for name in names]
    return [file for file in files if file] if all(files) else []
