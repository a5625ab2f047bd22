"""How fast each rank computes by itself. A slow one makes all others wait in every step, so that their steps
take equally long: only the time without that wait shows who is slow."""

import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.disk import write_atomically
from qwenlora.run.hardware import cpu_now, gpu_now
from qwenlora.run.records import Paces
from qwenlora.trainer.model import loading
from qwenlora.trainer.process import Process
from qwenlora.trainer.record.metrics import Logs
from qwenlora.trainer.record.trackers import Trackers

SLOW = 1.3  # times the median
FOR_STEPS = 50
MOST_SENT = 64  # ranks that trackers get a curve of
_TIMED = 8  # linear layers, where not the whole model is


class Pace(NamedTuple):
    """A rank's own time. seconds: of a step; per_token: in nanoseconds, since rows are of unequal length."""

    seconds: float
    per_token: float


class RankDevice(NamedTuple):
    """What a rank computes on. state: in words, what slows it down."""

    kind: str
    state: str


class Stopwatch:
    """Times modules in their forward pass, while they train. On a GPU, events in its stream mark when each
    began and ended: nobody waits for them."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules, self._on_gpu = modules, device.type == "cuda"
        self._began: Any = None
        self._spans: list[tuple[Any, Any, int]] = []  # begin, end, tokens

    def start(self) -> None:
        """Time from now on. Not before DeepSpeed has its hooks, which wait for weights: these go inside."""
        for module in self._modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, with_kwargs=True, prepend=True)

    def take(self, steps: int) -> Pace:
        """Return this rank's pace since the last call. steps: how many those were."""
        done = [span for span in self._spans if not self._on_gpu or span[1].query()]
        self._spans = self._spans[len(done) :]  # a stream's events come in order
        if self._on_gpu:
            seconds = sum(began.elapsed_time(ended) for began, ended, _ in done) / 1e3
        else:
            seconds = sum(ended - began for began, ended, _ in done)
        tokens = sum(tokens for *_, tokens in done)
        return Pace(seconds / max(steps, 1), 1e9 * seconds / max(tokens, 1))

    def _begin(self, module: nn.Module, _: object) -> None:
        self._began = self._now()

    def _end(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], _: object) -> None:
        if module.training:
            ids = kwargs.get("input_ids")
            tokens = args[0][..., 0].numel() if ids is None else ids.numel()
            self._spans.append((self._began, self._now(), tokens))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def alone(model: nn.Module, strategy: str, *, cut: bool, divided: bool) -> list[nn.Module]:
    """Return modules whose forward pass waits for no other rank: the model, or else some linear layers under
    LoRA. cut: ranks share sequences; divided: they share experts."""
    if strategy not in ("fsdp", "zero3") and not cut and not divided:
        return [model]
    layers = [each for name, each in model.named_modules() if name.endswith(".base_layer")]
    found: list[nn.Module] = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return found[:: max(1, len(found) // _TIMED)]


class SlowRanks:
    """Which ranks are slow. Each rank comes to the same answer."""

    def __init__(self, ranks: int) -> None:
        self._steps = [0] * ranks  # in a row, up to now
        self._named: set[int] = set()

    def add(self, paces: Sequence[Pace], steps: int) -> list[int]:
        """Return the ranks that have been slow for FOR_STEPS steps now. steps: of these paces."""
        # of two ranks, the faster one is the measure
        usual = Pace(*(statistics.median_low(numbers) for numbers in zip(*paces, strict=True)))
        late = []
        for rank, pace in enumerate(paces):
            slow = pace.seconds > SLOW * usual.seconds and pace.per_token > SLOW * usual.per_token
            self._steps[rank] = self._steps[rank] + steps if slow else 0
            if self._steps[rank] >= FOR_STEPS and rank not in self._named:
                self._named.add(rank)
                late.append(rank)
        return late


class PaceCallback(TrainerCallback):
    """Compares the ranks' paces when a step is logged; all ranks call it. trackers: None except on rank 0,
    which records."""

    def __init__(self, process: Process, watch: Stopwatch, trackers: Trackers | None) -> None:
        self._process, self._watch, self._trackers = process, watch, trackers
        self._slow = SlowRanks(process.rank.world_size)
        self._device = loading.device()
        self._hosts: list[str] = []
        self._told: list[str] = []
        self._steps = 0

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Learn where each rank is; begin to time."""
        # Slurm's name of the node, by which it can be left out
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._hosts = [host] * dist.get_world_size()
        dist.all_gather_object(self._hosts, host)
        self._watch.start()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Count."""
        self._steps += 1

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **_: object) -> None:
        """Add the ranks' paces to a training log, and name who is slow."""
        if "loss" not in logs or not self._steps:
            return
        steps, self._steps = self._steps, 0
        paces = self._of_all_ranks(steps)
        if late := self._slow.add(paces, steps):
            self._name(late, paces)
        seconds = [pace.seconds for pace in paces]
        slowest = max(seconds)
        logs |= {
            "rank_forward_s": statistics.median_low(seconds),
            "slowest_rank_forward_s": slowest,
            "slowest_rank": seconds.index(slowest),
        }
        if self._trackers:
            if len(seconds) <= MOST_SENT:
                numbers = {f"ranks/{rank}": each for rank, each in enumerate(seconds)}
                self._trackers.send(state.global_step, numbers)
            self._record(state.global_step, seconds)

    def _of_all_ranks(self, steps: int) -> list[Pace]:
        mine = torch.tensor(self._watch.take(steps), dtype=torch.float64, device=self._device)
        paces = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(paces, mine)
        return [Pace(*pace) for pace in torch.stack(paces).tolist()]

    def _name(self, late: Sequence[int], paces: Sequence[Pace]) -> None:
        """Say who is slow, and what their devices say of themselves."""
        usual = statistics.median_low(pace.seconds for pace in paces)
        mine = _this_device(self._device, ask=self._process.rank.rank in late)
        devices = [mine] * len(paces)
        dist.all_gather_object(devices, mine)
        most = statistics.mode(one.kind for one in devices)
        for rank in late:
            host, one, factor = self._hosts[rank], devices[rank], paces[rank].seconds / usual
            line = f"rank {rank} on {host} is slow: {factor:.2g} times the median for {FOR_STEPS} steps"
            self._told.append(f"{line} ({one.state})")
            self._process.warn(self._told[-1])
            # processes that share cores differ anyway, and so do kinds of GPU
            if self._trackers and self._device.type == "cuda" and one.kind == most:
                self._remember(host, self._told[-1])

    def _remember(self, host: str, line: str) -> None:
        """Remember the node, where a job could leave it out."""
        process = self._process
        if "SLURM_JOB_ID" not in os.environ:
            return
        try:
            BadNodes.beside(process.run).add("slow", host, line, process.run, process.attempt)
        except OSError as error:
            process.warn(f"{host} is not remembered as slow: {error.strerror}")

    def _record(self, step: int, seconds: Sequence[float]) -> None:
        run = self._process.run
        paces = Paces(step=step, hosts=self._hosts, seconds=list(seconds), slow=self._told)
        try:
            write_atomically(run.paces, paces.text(indent=None))
        except OSError:  # a full disk: nothing depends on it
            return


def _this_device(device: torch.device, *, ask: bool) -> RankDevice:
    """Return this rank's. ask: for its state, too."""
    if device.type != "cuda":
        return RankDevice("CPU", cpu_now() if ask else "")
    properties = torch.cuda.get_device_properties(device)
    return RankDevice(properties.name, gpu_now(f"GPU-{properties.uuid}") if ask else "")
