"""The tensors of an adapter, read without torch where numpy can: `read_adapter(folder)`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from qwenlora.adapter.deferred import Deferred
from qwenlora.adapter.subject import ADAPTER_CONFIG
from qwenlora.run.format import and_more
from qwenlora.trainer.model.damage import check_file
from qwenlora.trainer.model.headers import FLOATS, TensorValues, mapped, stored_in

if TYPE_CHECKING:
    from qwenlora.adapter import tensors
else:
    tensors = Deferred("qwenlora.adapter.tensors", quietly=False)

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # .bin: peft before 0.7
DTYPES = ("float32", "float64", "float16", "bfloat16")


def read_adapter(folder: Path) -> tuple[Path, dict[str, TensorValues]]:
    """Return an adapter's file and its tensors. Raises: ValueError when it cannot be read."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG}, but no {WEIGHTS[0]}; copy it there, or train it again"
        )
    check_file(file)
    if file.suffix == ".safetensors" and all(each.dtype in FLOATS for each in stored_in(file)):
        with _reading(file), safe_open(file, framework="numpy"):  # which checks the header
            values = mapped(file)
    else:
        with _reading(file):
            loaded = tensors.load(file)
        values = tensors.values_in(file, loaded)
    if not values:
        raise ValueError(f"{file} is empty: it holds no tensor; train it again")
    return file, values


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what a library raises about a broken file into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # weights_only refuses with whatever pickle raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read: {reason}") from None


def check_numbers(file: Path, values: Mapping[str, TensorValues]) -> None:
    """Raise ValueError for numbers of another kind than an adapter's, or that are not finite."""
    if odd := [name for name, each in sorted(values.items()) if each.dtype not in DTYPES]:
        raise ValueError(
            f"{file}: {odd[0]} is torch.{values[odd[0]].dtype}{and_more(odd)}, expected float32, float64,"
            " float16 or bfloat16"
        )
    check_finite(file, values)


def check_finite(file: Path, values: Mapping[str, TensorValues]) -> None:
    """Raise ValueError when a number of an adapter is not finite."""
    if broken := [name for name, each in sorted(values.items()) if not np.isfinite(each.numbers).all()]:
        raise ValueError(
            f"{file}: {broken[0]} holds numbers that are not finite{and_more(broken)}; train it again"
        )
