"""GPUs and their links, from hardware.yaml."""

import functools
import re
from importlib import resources
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from qwenlora.configs.wording import did_you_mean
from qwenlora.run.hardware import gpus_seen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# what a driver's name has beside the GPU's: form factors and sizes. Others (Laptop, Ti) are other chips
_NO_MATTER = re.compile(r"NVIDIA|Tesla|AMD|Instinct|OAM|SXM\d?|PCI[eE]|HBM\w*|\d+GB")


class Gpu(BaseModel):
    """A kind of GPU. flops: dense matrix products a second in 16 bits; bandwidth: of its memory, bytes a
    second; bytes: of its memory; nvlink, pcie: bytes a second to the node's other GPUs, one way, 0: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    teraflops: Positive
    terabytes_s: Positive
    memory_mib: Positive
    nvlink: NotNegative
    pcie: Positive

    @property
    def chip(self) -> str:
        """The name without the memory's size."""
        return self.name.partition("-")[0]

    @property
    def size(self) -> str:
        """The memory's size in the name, as 80 of A100-80; empty for others."""
        return self.name.partition("-")[2]

    @property
    def flops(self) -> float:
        """FLOP a second."""
        return self.teraflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.terabytes_s * 1e12

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return int(self.memory_mib * 2**20)

    @property
    def link(self) -> float:
        """Bytes a second to another GPU of its node, one way."""
        return (self.nvlink or self.pcie) * 1e9


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Return {name: GPU} of the file."""
    text = resources.files(__package__).joinpath("hardware.yaml").read_text(encoding="utf-8")
    kinds = yaml.safe_load(text)["gpus"]
    return {name: Gpu(name=name, **numbers) for name, numbers in kinds.items()}


def named(name: str) -> Gpu:
    """Return the GPU that a user names, as h100, rtx4090, or as its driver does; of a chip with several sizes
    of memory the first. Raises: ValueError for an unknown name."""
    wanted = _letters(name).removeprefix("rtx")
    for gpu in gpus().values():
        if wanted in (
            _letters(gpu.name),
            _letters(gpu.chip),
            _letters(gpu.name.removeprefix("GeForce RTX ")),
        ):
            return gpu
    otherwise = f"known are {', '.join(gpus())}"
    if by_driver := of_driver(name):
        return by_driver
    raise ValueError(f"gpu {name} is unknown; {did_you_mean(name.upper(), gpus(), otherwise)}")


def of_driver(name: str) -> Gpu | None:
    """Return the GPU by the driver's (and torch's) name, as NVIDIA A100-SXM4-80GB; None if unknown."""
    words = name.replace("-", " ").split()
    known = [gpu for gpu in gpus().values() if set(gpu.chip.split()) <= set(words)]
    chip = max((gpu.chip for gpu in known), key=len, default="")
    others = {word for word in words if not _NO_MATTER.fullmatch(word)} - set(chip.split())
    sizes = [gpu for gpu in known if gpu.chip == chip]
    return None if others or not sizes else next((gpu for gpu in sizes if f"{gpu.size}GB" in words), sizes[0])


def of_this_machine() -> Gpu | None:
    """Return the kind of this machine's GPUs, with the memory that their driver says; of several kinds that
    with most memory, since a run may have only these. None where there is none, or one that is not known."""
    seen = [(of_driver(gpu.name), gpu.mib) for gpu in gpus_seen()]
    known = [gpu.model_copy(update={"memory_mib": mib or gpu.memory_mib}) for gpu, mib in seen if gpu]
    return max(known, key=lambda gpu: gpu.memory_mib) if seen and len(known) == len(seen) else None


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
