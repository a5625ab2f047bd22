"""log.profile_steps: what some steps spend their time and memory on, by torch's profiler, on rank 0.

It watches and changes nothing: losses and adapter have the same bits with it. Steps before and after those
that it watches cost no more than without it."""

import functools
import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.run.disk import write_atomically
from qwenlora.trainer.process import Process
from qwenlora.trainer.record.profile_events import Recorded, operations
from qwenlora.trainer.record.profile_page import Profiled, Span, page

STEP = "step "  # begins the name of a step in the trace
FORWARD = "forward"


class Profiler(TrainerCallback):
    """Profiles some steps. wanted: the first and the last, counted from 1; trainer: a LoraTrainer."""

    def __init__(self, wanted: list[int], process: Process, trainer: Any) -> None:
        self.wanted, self.process, self.trainer = wanted, process, trainer
        self.first, self.last = 1, 0  # none, until the run's length is known
        self._profile: Any = None
        self._step, self._phases = ExitStack(), ExitStack()
        self._held = self._gradients = 0  # bytes

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Find out which of the steps this attempt has, and say so if it lacks some."""
        first, last = self.wanted
        start, end = state.global_step + 1, state.max_steps
        self.first, self.last = max(first, start), min(last, end)
        if (self.first, self.last) == (first, last):
            return
        which = f"only {_steps(self.first, self.last)}" if self.first <= self.last else "no step"
        self.process.warn(
            f"log.profile_steps=[{first}, {last}]: {which} will be profiled, since this attempt trains"
            f" {_steps(start, end)}"
        )

    def on_step_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the profile before the first step, and name each step in it."""
        number = state.global_step + 1
        if not self.first <= number <= self.last:
            return
        if self._profile is None:
            self._start()
        self._step.enter_context(record_function(f"{STEP}{number}"))

    def on_pre_optimizer_step(
        self, args: object, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Look at the gradients: they are gone at the end of a step."""
        if self._profile is not None:
            self._gradients = sum(
                _bytes(p.grad) for p in self.trainer.model.parameters() if p.grad is not None
            )

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the profile after the last step, unless the attempt is to stop: its save comes first."""
        if self._profile is None:
            return
        self._step.close()
        if state.global_step == self.last and not self.trainer.stop.agreed:
            self._finish()

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Drop the profile of an attempt that was stopped meanwhile."""
        if self._profile is not None:
            self._phases.close()
            self._profile.stop()
            self._profile = None
            self.process.warn(f"stopped after step {state.global_step} of {self._title}: no profile")

    @property
    def _title(self) -> str:
        return _steps(self.first, self.last)

    def _start(self) -> None:
        begun = time.perf_counter()
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profile = profile(activities=activities, profile_memory=True)
        self._held = torch.cuda.memory_allocated() if on_gpu else 0
        for owner, method, phase in _phases_of(self.trainer):
            self._phases.enter_context(_named(owner, method, phase))
        self._profile.start()
        self.trainer.idle_s += time.perf_counter() - begun

    def _finish(self) -> None:
        begun = time.perf_counter()
        self._phases.close()
        self._profile.stop()
        run = self.process.run
        name = f"steps-{self.first}-{self.last}"
        trace, summary = run.profile / f"{name}.json.gz", run.profile / f"{name}.md"
        try:
            run.profile.mkdir(exist_ok=True)
            recorded = Recorded(self._profile)
            recorded.write(trace)
            write_atomically(
                summary, page(self._profiled(recorded), f"{run.path.name}, {self._title}", trace.name)
            )
            self.process.say(f"profile of {self._title}: {os.path.relpath(summary)}")
        except OSError as error:  # a full disk ends no run
            self.process.warn(f"the profile of {self._title} cannot be written: {error.strerror}")
        self._profile = None  # it holds all events
        self.trainer.idle_s += time.perf_counter() - begun

    def _profiled(self, recorded: Recorded) -> Profiled:
        """Return what was recorded, for the page."""
        names = {phase for *_, phase in _phases_of(self.trainer)}
        phases = recorded.named(names)
        return Profiled(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            steps=recorded.named([STEP]),
            phases=phases,
            operations=operations(recorded.events),
            memory=self._memory(recorded, [span for span in phases if span.name == FORWARD]),
            on_gpu=recorded.named(names, on_gpu=True),
            kernels=[one.span for one in recorded.events if one.is_kernel],
        )

    def _memory(self, recorded: Recorded, forwards: list[Span]) -> dict[str, int]:
        """Return bytes by category. Those of activations are what forward passes leave allocated."""
        model = self.trainer.model
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        state = [value for values in optimizer.state.values() for value in values.values()]
        sizes = {
            "base": sum(_bytes(p) for p in model.parameters() if not p.requires_grad),
            "adapter": sum(_bytes(p) for p in model.parameters() if p.requires_grad),
            "gradients": self._gradients,
            "optimizer": sum(_bytes(value) for value in state if isinstance(value, torch.Tensor)),
        }
        held = recorded.allocated(on_gpu=torch.cuda.is_available())
        kept = [_at(held, span.end) - _at(held, span.start) for span in forwards]
        sizes["activations that a forward pass keeps, at most"] = max(kept, default=0)
        highest = max((total for _, total in held), default=0)
        more = "all at the highest moment" if self._held else "at the highest moment, more than at the start"
        sizes |= {more: self._held + highest}
        return {what: size for what, size in sizes.items() if size}  # DeepSpeed keeps gradients by itself


def _phases_of(trainer: Any) -> list[tuple[Any, str, str]]:
    """Return (object, method, phase) for what a step is made of. DeepSpeed takes the optimizer's step where
    the gradient's norm is asked for."""
    return [
        (trainer, "get_batch_samples", "waiting for rows"),
        (trainer, "compute_loss", FORWARD),
        (trainer.accelerator, "backward", "backward"),
        (trainer, "_clip_grad_norm", "norm and optimizer"),
        (trainer, "_get_grad_norm", "norm and optimizer"),
        (trainer.optimizer, "step", "norm and optimizer"),
    ]


@contextmanager
def _named(owner: Any, method: str, phase: str) -> Iterator[None]:
    """Give an object's method a name in the trace while the context is open."""
    plain, own = getattr(owner, method), vars(owner).get(method)

    @functools.wraps(plain)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(phase):
            return plain(*args, **kwargs)

    setattr(owner, method, named)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def _steps(first: int, last: int) -> str:
    return f"steps {first} to {last}" if first < last else f"step {first}"


def _at(totals: list[tuple[float, int]], moment: float) -> int:
    """Return the last total before a moment."""
    place = bisect_right(totals, moment, key=lambda total: total[0])
    return totals[place - 1][1] if place else 0


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of this rank's part of it."""
    part = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's
    part = getattr(part, "_local_tensor", part)  # FSDP's
    return int(part.numel() * part.element_size())
