"""Ranks that compare made-up paces."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from transformers import TrainerState

from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record.pace import Pace, PaceCallback


def compare(folder: Path, paces: list[list[float]], steps: int) -> dict[str, Any]:
    """Return what a rank logs, warns of and sends. paces: of each log, the seconds of each rank's steps;
    steps: in each log."""
    rank, warned, sent, logged = dist.get_rank(), [], [], []
    mine = iter([seconds[rank] for seconds in paces])
    watch = SimpleNamespace(start=lambda: None, take=lambda steps: Pace(next(mine), 1.0 + rank))
    process = SimpleNamespace(
        rank=SimpleNamespace(rank=rank, world_size=dist.get_world_size()),
        run=RunFolder(folder),
        warn=warned.append,
        attempt=1,
    )
    trackers = SimpleNamespace(send=lambda step, values: sent.append((step, values))) if rank == 0 else None
    callback, state = PaceCallback(process, watch, trackers), TrainerState()
    callback.on_train_begin(None, state, None)
    for number in range(len(paces)):
        for _ in range(steps):
            state.global_step += 1
            callback.on_step_end(None, state, None)
        logs = {"loss": 1.0}
        callback.on_log(None, state, None, logs=logs)
        callback.on_log(None, state, None, logs={"eval_loss": float(number)})  # compares nothing
        logged.append(logs)
    return {"logged": logged, "warned": warned, "sent": sent, "host": socket.gethostname()}
