"""How this attempt spreads the model: what the config says, or what auto decides for these GPUs; alike on all
ranks."""

import logging
import os
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qwenlora.configs import Config
from qwenlora.configs.combinations import ZERO, Machine, refuse
from qwenlora.configs.deepspeed import deepspeed_config
from qwenlora.configs.estimate import Sizes, decide
from qwenlora.run.records import Parameters
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model.base import pick_dtype
from qwenlora.trainer.model.base_files import peak_memory
from qwenlora.trainer.spread.links import nvlink

log = logging.getLogger("qwenlora")


class Spread(NamedTuple):
    """A strategy, decided. shape: of the device mesh that a base in parts is spread over, [replicas, parts]
    or [parts].

    deepspeed: its config, for zero1 to zero3; why: the sentence that auto has for it, or empty.
    """

    name: str = "ddp"
    shape: tuple[int, ...] = (1,)
    deepspeed: dict[str, Any] | None = None
    why: str = ""

    @property
    def said(self) -> str:
        """The strategy in words: fsdp in 2 groups of 8."""
        return self.name + (f" in {self.shape[0]} groups of {self.shape[1]}" if len(self.shape) == 2 else "")


def machine() -> Machine:
    """Return where this run is: as the launcher says, and the GPUs as torch sees them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if not torch.cuda.is_available():
        return Machine(world_size // processes, processes, 0)
    memory = torch.tensor(
        torch.cuda.get_device_properties(models.device()).total_memory, device=models.device()
    )
    if dist.is_initialized():
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)  # else ranks would decide differently
    linked = torch.tensor(int(processes > 1 and nvlink()), device=models.device())
    if dist.is_initialized():
        dist.all_reduce(linked, op=dist.ReduceOp.MIN)
    return Machine(world_size // processes, processes, torch.cuda.device_count(), int(memory), bool(linked))


def choose(config: Config, parameters: Parameters, accumulation: int, longest: int = 0) -> Spread:
    """Return the strategy of this attempt; all ranks call it. longest: row, in tokens; 0: as long as may be.

    Raises: ValueError when nothing fits, or it cannot be.
    """
    here = machine()
    dtype = str(pick_dtype(config.model.dtype)).removeprefix("torch.")  # auto is float16 on old GPUs
    known = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    refuse(known, here)
    decision = decide(known, Sizes.of(parameters, longest), here)
    settings = None
    if decision.name in ZERO:
        settings = deepspeed_config(config, decision.name, here.processes, accumulation)
    by_node = decision.shard_group == "node" and here.nodes > 1
    shape = (here.nodes, here.processes) if by_node else (here.world_size,)
    return Spread(decision.name, shape, settings, decision.sentence)


def load_base(config: Config, base: str, spread: Spread) -> Any:
    """Return the base model, frozen, as this rank holds it: whole, quantised, or its part."""
    if spread.name in (*ZERO, "fsdp"):
        join_alone()
    if spread.name == "fsdp":
        from qwenlora.trainer.spread import sharded_loading as loading

        names = ("replicas", "parts")[-len(spread.shape) :]
        mesh = init_device_mesh(models.device().type, spread.shape, mesh_dim_names=names)
        model = loading.load_fsdp(config, base, mesh)
    elif spread.name == "zero3" and spread.deepspeed and config.strategy.quantization == "none":
        from qwenlora.trainer.spread import sharded_loading as loading
        from qwenlora.trainer.spread import zero

        zero.start_communication()
        model = loading.load_zero3(config, base, spread.deepspeed)
    else:  # ZeRO-3 takes a quantised base apart when its engine is made
        started = time.monotonic()
        model = models.load_base(config, base)
        seconds, peak = time.monotonic() - started, peak_memory() / 1e9
        log.info(
            "base loaded in %.1f s, whole; this process's host memory has come to %.2f GB at most",
            seconds,
            peak,
        )
    models.set_up(model, config)
    return model


def join_alone() -> None:
    """Make a process group of one, where there is none: FSDP2 and DeepSpeed want one in any case."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks for it
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
