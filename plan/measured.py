"""What was measured on a user's machines: how fast devices are (`qwenlora plan --calibrate`), and how far
runs were from their plans. One small file a user, which may be deleted at any time."""

import os
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from qwenlora.configs.schema import Config
from qwenlora.plan.hardware import Gpu, NotNegative, Positive
from qwenlora.run.disk import write_atomically
from qwenlora.run.records import Record

KEPT = 9  # runs of a device and a kind of strategy
ENOUGH = 3  # of them before a plan is corrected: one may have been odd
MEMORY_BY, TIME_BY = 1.25, 2.0  # by how much a plan is corrected at most


class Rates(BaseModel, frozen=True):
    """What a device reaches in long operations. products: {dtype: FLOP a second in matrix products}; memory:
    bytes a second that a copy reads and writes; link: bytes a second to another GPU of its node, one way, 0:
    not measured."""

    products: dict[str, Positive] = Field(min_length=1)
    memory: Positive
    link: NotNegative = 0.0


class Ran(BaseModel, frozen=True):
    """What a run took, relative to the formulas. kind: of its strategy; memory: None where that cannot be
    compared."""

    device: str
    kind: str
    time: NotNegative
    memory: NotNegative | None = None


class Correction(NamedTuple):
    """Factors of what the formulas say. runs: from how many, 0: none."""

    memory: float = 1.0
    time: float = 1.0
    runs: int = 0


class Measured(Record):
    """The file. devices: rates by the device's name, a GPU's as in hardware.yaml; runs: the oldest first."""

    devices: dict[str, Rates] = Field({})
    runs: list[Ran] = Field([])

    def correction(self, device: str, kind: str) -> Correction:
        """Return the correction of a plan: medians of the last runs, within bounds; none after too few."""
        runs = [run for run in self.runs if (run.device, run.kind) == (device, kind)]
        if len(runs) < ENOUGH:
            return Correction()
        memory = [run.memory for run in runs if run.memory is not None]
        return Correction(
            _bounded(statistics.median(memory), MEMORY_BY) if len(memory) >= ENOUGH else 1.0,
            _bounded(statistics.median(run.time for run in runs), TIME_BY),
            len(runs),
        )

    def with_run(self, ran: Ran) -> "Measured":
        """Return this with one more run."""
        alike = [(run.device, run.kind) == (ran.device, ran.kind) for run in self.runs]
        too_many = max(0, sum(alike) + 1 - KEPT)
        old = [number for number, is_alike in enumerate(alike) if is_alike][:too_many]
        return self.revised(runs=[*(run for number, run in enumerate(self.runs) if number not in old), ran])

    def with_device(self, name: str, rates: Rates) -> "Measured":
        """Return this with a device's rates."""
        return self.revised(devices=self.devices | {name: rates})


def kind_of_strategy(config: Config, name: str) -> str:
    """Return what runs have in common whose plans are off alike. name: of the strategy."""
    quantization = config.strategy.quantization
    return name if quantization == "none" else f"{name} {quantization}"


def file() -> Path:
    """Return the user's file."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    with suppress(RuntimeError):  # there is no home
        folder = folder.expanduser()
    return folder / "qwenlora" / "measured.json"


def read() -> Measured:
    """Return the user's file; nothing, with a warning, if it is damaged."""
    path = file()
    try:
        return Measured.read(path)
    except FileNotFoundError:
        return Measured()
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        print(f"warning: {path} cannot be read: {said}; it may be deleted", file=sys.stderr)
        return Measured()


def change(changed: Callable[[Measured], Measured]) -> None:
    """Change the user's file. Raises: OSError."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, changed(read()).text())


def device_of(name: str, mib: float, rates: Rates) -> Gpu:
    """Return a device that hardware.yaml does not know, by what was measured: a CPU, or another GPU. mib: of
    its memory."""
    link = rates.link / 1e9
    return Gpu(
        name=name,
        teraflops=max(rates.products.values()) / 1e12,
        terabytes_s=rates.memory / 1e12,
        memory_mib=mib,
        nvlink=link,
        pcie=link or rates.memory / 2e9,  # processes on a CPU copy through its memory
    )


def _bounded(factor: float, most: float) -> float:
    return min(max(factor, 1 / most), most)
