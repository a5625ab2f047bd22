"""A check of all ranks before any weight is loaded: that they multiply and reduce right, and how fast. It
takes a few seconds. A wrong result ends the attempt and names host and rank; a warning names slow ranks."""

import os
import socket
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

from qwenlora.configs import Config
from qwenlora.trainer.ranks.faults import TrainingFault

SLOW = 0.7  # of the median speed: a rank below it is named
_GPU_SIZE, _CPU_SIZE = 8192, 512  # rows and columns of the matrices
_GPU_BYTES, _CPU_BYTES = 2**28, 2**22  # of the tensor that is reduced
_REPEATS = 5


class Checked(NamedTuple):
    """One rank's result. tflops: of matrix products; gb_s: of the reduction, about the same for all ranks;
    wrong: the faults, or empty."""

    host: str
    rank: int
    tflops: float
    gb_s: float
    wrong: str


def is_wanted(config: Config) -> bool:
    """Whether the config wants the check, and it can tell anything: on several nodes, or with GPUs."""
    several_nodes = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    return config.launch.preflight == "full" and (several_nodes or torch.cuda.is_available())


def check_and_show(device: torch.device, console: Console) -> None:
    """Check with all ranks, and show the result. Raises: TrainingFault, on all ranks."""
    line, slow = summary(check(device))
    console.print(line, soft_wrap=True)
    if slow and torch.cuda.is_available():  # processes that share cores differ anyway
        console.print(f"warning: {slow}", style="yellow", soft_wrap=True)


def check(device: torch.device) -> list[Checked]:
    """Return each rank's result; all ranks call it. Raises: TrainingFault, on all, naming the wrong ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    tflops, product_wrong = _multiply(device)
    gb_s, sum_wrong = _reduce(device) if dist.is_initialized() else (0.0, "")
    mine = Checked(socket.gethostname(), rank, tflops, gb_s, product_wrong or sum_wrong)
    results = [mine]
    if dist.is_initialized():
        results = [mine] * dist.get_world_size()
        dist.all_gather_object(results, mine)
    if wrong := [result for result in results if result.wrong]:
        told = "; ".join(f"rank {result.rank} on {result.host}: {result.wrong}" for result in wrong)
        raise TrainingFault(
            f"{told}; leave the host out (sbatch --exclude) and tell its administrators",
            [result.rank for result in wrong],
        )
    return results


def summary(results: list[Checked]) -> tuple[str, str]:
    """Return the results in one line, and a warning about slow ranks, empty if there are none."""
    hosts = {result.host for result in results}
    median = statistics.median(result.tflops for result in results)
    if len(results) == 1:
        return f"checked 1 rank: it multiplies at {median:.3g} TFLOP/s", ""
    slowest = min(results, key=lambda result: result.tflops)
    line = (
        f"checked {len(results)} ranks on {len(hosts)} node{'s' * (len(hosts) > 1)}: they reduce at"
        f" {min(result.gb_s for result in results):.3g} GB/s, and multiply at {median:.3g} TFLOP/s (median),"
        f" the slowest, rank {slowest.rank} on {slowest.host}, at {slowest.tflops:.3g}"
    )
    slow = [
        f"rank {result.rank} on {result.host} ({result.tflops:.3g} TFLOP/s)"
        for result in results
        if result.tflops < SLOW * median
    ]
    warning = f"{', '.join(slow)}: slower than the others, who will wait for it in each step"
    return line, warning if slow else ""


def _multiply(device: torch.device) -> tuple[float, str]:
    """Return a matrix product's speed in TFLOP/s, and its fault, or an empty string."""
    on_gpu = device.type == "cuda"
    size, kind = (_GPU_SIZE, torch.bfloat16) if on_gpu else (_CPU_SIZE, torch.float32)
    # rows i % 3, columns j % 2: each entry is size (a power of two) * i * j (at most 2): exact in any dtype
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
    """Return an all-reduce's bus bandwidth in GB/s (as nccl-tests counts it), and its fault, or empty."""
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
