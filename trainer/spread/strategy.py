"""How this attempt spreads the model over ranks, by the config or by auto; all ranks decide the same."""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from qwenlora.configs import Config
from qwenlora.configs.combinations import ZERO, Machine, refuse
from qwenlora.configs.deepspeed import deepspeed_config
from qwenlora.configs.estimate import Decision, Sizes, cut_into, decide, micro_batch, recomputed_layers
from qwenlora.data.order import accumulation_steps, micro_batches
from qwenlora.run.hardware import free_memory
from qwenlora.run.records import Parameters
from qwenlora.trainer.model import loading
from qwenlora.trainer.model.base_files import peak_memory
from qwenlora.trainer.model.fused_experts import is_part
from qwenlora.trainer.ranks.faults import unlike_rank_0
from qwenlora.trainer.ranks.rendezvous import is_pretended
from qwenlora.trainer.spread import sharded_loading, zero
from qwenlora.trainer.spread.links import nvlink
from qwenlora.trainer.spread.zero import DeepSpeedConfig

log = logging.getLogger("qwenlora")
KEPT = "as the run began"
SAMPLED = 64  # numbers of each weight that ranks compare


class Spread(NamedTuple):
    """A chosen strategy. shape: of the mesh over which fsdp and zero3 shard the base, [replicas, shards] or
    [shards]; deepspeed: its config, for zero1 to zero3; why: auto's reason, one sentence, or empty;
    recomputed: layers that compute their activations again in the backward pass; micro_batch: rows, or packs,
    that a rank holds at once; why_so_many: auto's reason for that, or empty; machine: it was chosen for."""

    name: str = "ddp"
    shape: tuple[int, ...] = (1,)
    deepspeed: DeepSpeedConfig | None = None
    why: str = ""
    recomputed: int = 0
    micro_batch: int = 1
    why_so_many: str = ""
    machine: Machine = Machine(1, 1, 0)

    @property
    def shard_group(self) -> str:
        """Over which ranks the base is sharded, as strategy.shard_group."""
        return "node" if len(self.shape) == 2 else "global"

    @property
    def description(self) -> str:
        """Return the strategy in words, as `fsdp in 2 groups of 8`."""
        return self.name + (f" in {self.shape[0]} groups of {self.shape[1]}" if len(self.shape) == 2 else "")


def machine() -> Machine:
    """Return this run's machine: nodes and processes by the launcher's variables, GPUs by torch."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if not torch.cuda.is_available():
        return Machine(world_size // processes, processes, 0)
    memory = torch.cuda.get_device_properties(loading.device()).total_memory
    smallest = torch.tensor([memory, int(processes > 1 and nvlink())], device=loading.device())
    if dist.is_initialized():
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)  # else ranks would decide differently
    memory, linked = smallest.tolist()
    return Machine(world_size // processes, processes, torch.cuda.device_count(), memory, bool(linked))


def choose(config: Config, parameters: Parameters, longest: int = 0, before: int = 0) -> Spread:
    """Return this attempt's strategy; all ranks call it. longest: row or pack, in tokens; 0: data.max_length;
    before: the micro-batch of the checkpoint that the run goes on from, which auto keeps where it can; 0:
    none. Raises: ValueError when no strategy fits the GPUs, or the config's cannot run here."""
    here = machine()
    dtype = str(loading.pick_dtype(config.model.dtype)).removeprefix("torch.")  # auto is float16 on old GPUs
    resolved = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    refuse(resolved, here)
    sizes = Sizes.of(parameters, longest)
    decision = decide(resolved, sizes, here)
    size, why = _micro_batch(resolved, sizes, decision, here, before)
    resolved = cut_into(resolved, size)
    recomputed = recomputed_layers(resolved, sizes, decision.name, here, decision.shard_group)
    by_node = decision.shard_group == "node" and here.nodes > 1
    shape = (here.nodes, here.processes) if by_node else (here.world_size,)
    spread = Spread(decision.name, shape, None, decision.sentence, recomputed, size, why, here)
    return spread._replace(deepspeed=deepspeed_settings(config, spread))


def deepspeed_settings(config: Config, spread: Spread) -> DeepSpeedConfig | None:
    """Return DeepSpeed's config for a strategy; None for those that are not DeepSpeed's. Raises: ValueError
    when the global batch cannot be cut into the strategy's micro-batches, or strategy.deepspeed_config does
    not fit."""
    here, train = machine(), config.train
    parallel = config.strategy.sequence_parallel
    steps = accumulation_steps(train.global_batch_size, spread.micro_batch, here.world_size, parallel)
    if spread.name not in ZERO:
        return None
    return deepspeed_config(cut_into(config, spread.micro_batch), spread.name, here.processes, steps)


def _micro_batch(
    config: Config, sizes: Sizes, decision: Decision, here: Machine, before: int
) -> tuple[int, str]:
    """Return how many rows, or packs, a rank holds at once, and auto's reason."""
    train = config.train
    if train.per_device_train_batch_size != "auto":
        return train.micro_batch, ""
    among = micro_batches(train.global_batch_size, here.world_size, config.strategy.sequence_parallel)
    memory = here.gpu_bytes if here.gpus else _host_memory(here)
    if before in among:
        return before, KEPT
    size = micro_batch(config, sizes, decision, here, among, memory)
    where = "the GPU's memory" if here.gpus else "half of the free memory"
    return size, f"the most that fit {where}, {memory / 1e9:.1f} GB"


def _host_memory(here: Machine) -> int:
    """Return the bytes of host memory that each rank may use: half of what is free, since a process that
    takes too much is killed, and cannot try less."""
    share = torch.tensor(free_memory() // (2 * here.processes))
    if dist.is_initialized():
        dist.all_reduce(share, op=dist.ReduceOp.MIN)
    return int(share)


def load_base(config: Config, base: str, spread: Spread) -> Any:
    """Return the base model, frozen, as this rank holds it: whole, quantised, or its shard."""
    if spread.name in (*ZERO, "fsdp"):
        join_alone()
    if spread.name == "fsdp":
        names = ("replicas", "shards")[-len(spread.shape) :]
        mesh = init_device_mesh(loading.device().type, spread.shape, mesh_dim_names=names)
        model = sharded_loading.load_fsdp(config, base, mesh)
    elif spread.name == "zero3" and spread.deepspeed and config.strategy.quantization == "none":
        zero.start_communication()
        model = sharded_loading.load_zero3(config, base, spread.deepspeed)
    elif (parts := config.strategy.expert_parallel) > 1:
        load = loading.load_base if config.strategy.quantization == "nf4" else sharded_loading.load_divided
        model = load(config, base, dist.get_rank() % parts, parts)
    else:  # ZeRO-3 shards a quantised base when its engine is made
        started = time.monotonic()
        model = loading.load_base(config, base)
        seconds, peak = time.monotonic() - started, peak_memory() / 1e9
        log.info(
            "base loaded in %.1f s, whole; the most host memory that this process has used is %.2f GB",
            seconds,
            peak,
        )
    loading.set_up(model, spread.recomputed)
    return model


def check_same_base(model: Any) -> None:
    """Compare samples of the ranks' frozen weights, which are whole. Raises: ValueError, on all ranks."""
    sums = []
    for parameter in model.parameters():
        if not parameter.requires_grad and not is_part(parameter):
            numbers = parameter.detach().flatten()
            sample = numbers[:: max(1, len(numbers) // SAMPLED)].contiguous()
            sums.append(sample.view(torch.uint8).sum(dtype=torch.int64))
    if others := unlike_rank_0(torch.stack(sums)):
        ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
        raise ValueError(
            f"model.name_or_path: {ranks} read a base with other weights than rank 0 did; give all nodes the"
            " same files"
        )


def replicate_trained(model: Any, but: Sequence[str] = ()) -> Any:
    """Return a model under DDP, which sees only the trained parameters that are whole on every rank. but:
    names of the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad or name in but]
    if len(ignored) == len(list(model.parameters())):
        return model
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
    # gradients lie in the buckets that are sent: without a copy there and back, and a second time in memory
    wrapped = DistributedDataParallel(model, find_unused_parameters=False, gradient_as_bucket_view=True)
    if is_pretended():  # DDP's own reduction wants an answer
        wrapped.register_comm_hook(None, _as_it_is)
    return wrapped


def _as_it_is(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def join_alone() -> None:
    """Make a process group of this process alone if there is no group: FSDP2 and DeepSpeed need one."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
