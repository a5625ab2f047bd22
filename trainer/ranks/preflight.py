"""What all ranks check together before a weight is loaded: that they reduce and multiply right, and how fast.

A few seconds at most. A wrong result ends the attempt and names host and rank; one that is slow is named in a
warning.
"""

import socket
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from qwenlora.trainer.ranks.faults import TrainingFault

SLOW = 0.7  # of the median speed
_GPU_SIZE, _CPU_SIZE = 8192, 512  # rows and columns of the matrices
_GPU_BYTES, _CPU_BYTES = 2**28, 2**22  # of the reduction
_REPEATS = 5


class Checked(NamedTuple):
    """What one rank found. tflops: of matrix products; gb_s: of the reduction (all ranks see about the
    same)."""

    host: str
    rank: int
    tflops: float
    gb_s: float
    wrong: str


def check(device: torch.device) -> list[Checked]:
    """Return what each rank found; all must call it. Raises: TrainingFault, on all, naming those that are
    wrong."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    tflops, product_wrong = _multiply(device)
    gb_s, sum_wrong = _reduce(device) if dist.is_initialized() else (0.0, "")
    mine = Checked(socket.gethostname(), rank, tflops, gb_s, product_wrong or sum_wrong)
    everyones: list[Checked] = [mine]
    if dist.is_initialized():
        everyones = [mine] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    if wrong := [one for one in everyones if one.wrong]:
        names = "; ".join(f"rank {one.rank} on {one.host}: {one.wrong}" for one in wrong)
        raise TrainingFault(f"{names}; leave the host out (sbatch --exclude) and tell its administrators")
    return everyones


def summary(checked: list[Checked]) -> tuple[str, str]:
    """Return what the ranks found in one line, and a warning about slow ones, if there are any."""
    hosts = list(dict.fromkeys(one.host for one in checked))
    median, slowest = (
        statistics.median(one.tflops for one in checked),
        min(checked, key=lambda one: one.tflops),
    )
    if len(checked) == 1:
        return f"checked 1 rank: it multiplies at {_number(median)} TFLOP/s", ""
    line = (
        f"checked {len(checked)} ranks on {len(hosts)} node{'s' * (len(hosts) > 1)}: they reduce at"
        f" {_number(min(one.gb_s for one in checked))} GB/s, and multiply at {_number(median)} TFLOP/s"
        f" (median), the slowest, rank {slowest.rank} on {slowest.host}, at {_number(slowest.tflops)}"
    )
    slow = [one for one in checked if one.tflops < SLOW * median]
    names = ", ".join(f"rank {one.rank} on {one.host} ({_number(one.tflops)} TFLOP/s)" for one in slow)
    all_wait = "slower than the others, who will wait for it in each step"
    return line, f"{names}: {all_wait}" if slow else ""


def _number(value: float) -> str:
    return f"{value:.3g}"


def _multiply(device: torch.device) -> tuple[float, str]:
    """Return TFLOP/s of a matrix product, and what is wrong with it. All entries are small integers: it is
    exact."""
    on_gpu = device.type == "cuda"
    size, kind = (_GPU_SIZE, torch.bfloat16) if on_gpu else (_CPU_SIZE, torch.float32)
    # rows i % 3, columns j % 2: each entry of the product is size * i * j, and a power of two times at most 2
    left = (torch.arange(size, device=device) % 3).to(kind)[:, None].expand(size, size).contiguous()
    right = (torch.arange(size, device=device) % 2).to(kind)[None, :].expand(size, size).contiguous()
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        start = time.perf_counter()
        product = left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    wrong = int((product != size * left * right).sum())
    return (
        2 * size**3 / best / 1e12,
        f"{wrong} of {size * size} entries of a matrix product are wrong" if wrong else "",
    )


def _reduce(device: torch.device) -> tuple[float, str]:
    """Return GB/s of an all-reduce, by its bus bandwidth as nccl-tests counts it, and what is wrong with
    it."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    count = (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4
    best = float("inf")
    for _ in range(_REPEATS):
        numbers = torch.full((count,), float(rank + 1), device=device)
        _wait(device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    expected = world_size * (world_size + 1) / 2
    wrong = int((numbers != expected).sum())
    gb_s = 4 * count / best / 1e9 * 2 * (world_size - 1) / world_size
    return gb_s, f"{wrong} of {count} numbers of an all-reduce are wrong" if wrong else ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
