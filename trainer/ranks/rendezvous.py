"""How ranks meet, become a process group, and leave together."""

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from qwenlora.configs import Config
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.screen import Rank

LONGEST_PREPARATION = timedelta(days=7)
_SHORTEST_WAIT_S = 60  # ranks of a node start together, but a slow disk makes their imports long
_POLL_S = 0.1


def meet(config: Config, rank: Rank) -> None:
    """Wait for all ranks, then make the process group; does nothing for a single rank, or the second time.
    Rank 0 may prepare data for hours before it comes: the others wait at the store, where no collective can
    time out. Raises: TrainingFault, on rank 0, naming the ranks that do not come."""
    if rank.world_size == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(rendezvous("env://", rank.rank, rank.world_size, timeout=LONGEST_PREPARATION))
    ready = f"qwenlora/ready/{_restart()}"
    if rank.first:
        store.set(ready, "1")
    else:
        if os.environ.get("LOCAL_RANK") == "0" and not store.check([ready]):  # one line a node
            print(f"{socket.gethostname()}: waiting for rank 0, which prepares model and data", flush=True)
        store.wait([ready], LONGEST_PREPARATION)
    _wait_for_all(store, rank, config.launch.join_timeout_s)
    timeout = timedelta(seconds=config.launch.ddp_timeout_s)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
    dist.barrier()


def pretend(rank: Rank) -> None:
    """Make torch's fake process group, in which nobody sends anything: this process alone is there, and runs
    as one of world_size ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(dist.Backend.FAKE, store=store, rank=rank.rank, world_size=rank.world_size)


def is_pretended() -> bool:
    """Whether the other ranks are not there (trainer/simulate.py)."""
    return dist.is_initialized() and dist.get_backend() == dist.Backend.FAKE


def leave() -> None:
    """Leave together: torchrun and DeepSpeed's launcher end all ranks when one leaves with exit code 75."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _wait_for_all(store: Any, rank: Rank, timeout_s: int) -> None:
    """Put this rank's host into the store; rank 0 waits until all have done so."""
    keys = [f"qwenlora/here/{_restart()}/{number}" for number in range(rank.world_size)]
    store.set(keys[rank.rank], socket.gethostname())
    if not rank.first:
        return
    end = time.monotonic() + max(timeout_s, _SHORTEST_WAIT_S)
    while missing := [number for number, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > end:
            names = ", ".join(map(str, missing))
            raise TrainingFault(
                f"rank{'s' * (len(missing) > 1)} {names} did not join; their logs may say why"
            )
        time.sleep(_POLL_S)


def _restart() -> str:
    """Return how often torchrun has restarted these ranks: the store outlives them, and keys must differ."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
