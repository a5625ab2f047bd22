"""`plan --calibrate`: how fast this machine multiplies matrices, copies memory, and sends to another GPU."""

import time
from collections.abc import Callable
from functools import partial

import torch

from qwenlora.plan.hardware import of_driver
from qwenlora.plan.measured import Rates
from qwenlora.run.hardware import cpu_name, free_memory
from qwenlora.trainer.ranks import gpus

DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("bfloat16", "float32")}
LONG_S = 1.5  # of each measurement
SMALLEST, LARGEST = 512, 8192  # rows and columns of the matrices
LONG_ENOUGH_S = 0.02  # of a product, so that starting it counts nothing
COPIED = 2**30  # bytes; more than any cache


def calibrate() -> tuple[str, Rates]:
    """Measure this machine's first GPU or, without one, its CPU; return its name and rates. Takes about 10 s.
    Raises: ValueError for GPUs that torch cannot use."""
    gpus.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return name_of(device), Rates(
        products={dtype: _products(device, getattr(torch, dtype)) for dtype in DTYPES[device.type]},
        memory=_copies(device),
        link=_link() if torch.cuda.device_count() > 1 else 0.0,
    )


def name_of(device: torch.device) -> str:
    """Return a device's name, of GPUs that are known as hardware.yaml has it."""
    if device.type == "cpu":
        return cpu_name()
    name = torch.cuda.get_device_name(device)
    known = of_driver(name)
    return known.name if known else name


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP a second of products of large matrices."""
    size, seconds = SMALLEST, 0.0
    while seconds < LONG_ENOUGH_S and size < LARGEST:
        size *= 2
        seconds = _seconds(_product(size, device, dtype), device, 0)
    return 2 * size**3 / _seconds(_product(size, device, dtype), device, LONG_S)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    left = torch.rand(size, size, device=device).to(dtype)
    return partial(torch.mm, left, left, out=torch.empty_like(left))


def _copies(device: torch.device) -> float:
    """Return the bytes a second that a copy reads and writes."""
    count = COPIED if device.type == "cuda" else min(COPIED, free_memory() // 8)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * count / _seconds(lambda: target.copy_(source), device, LONG_S)


def _link() -> float:
    """Return the bytes a second from the first GPU to the second."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda:0")
    target = torch.ones(COPIED, dtype=torch.uint8, device="cuda:1")
    return COPIED / _seconds(lambda: target.copy_(source), source.device, LONG_S)


def _seconds(work: Callable[[], object], device: torch.device, long_s: float) -> float:
    """Return the least seconds that work takes, repeated for so long, and at least once after the first."""
    best, end = float("inf"), time.monotonic() + long_s
    _wait_after(work, device)
    while True:
        start = time.perf_counter()
        _wait_after(work, device)
        best = min(best, time.perf_counter() - start)
        if time.monotonic() > end:
            return best


def _wait_after(work: Callable[[], object], device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
