"""Numbers of a run as it goes: metrics.jsonl, one line a logging step or evaluation, always written.

Metrics adds what Trainer does not know (throughput, MFU, memory, waiting) to each of Trainer's logs, and must be the
first of the callbacks: those after it (progress, W&B) show the same numbers.
"""

import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenlora.jobs.disk import write_atomically
from qwenlora.trainer.model import Parameters

# dense bf16 matrix peaks in FLOP/s, from NVIDIA's data sheets; the longest name that fits decides
PEAK_FLOPS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
}


_SAYS_NOTHING = re.compile(r"NVIDIA|Tesla|SXM\d?|PCI[eE]|HBM\w*|\d+GB")


def peak_flops(gpu_name: str) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s by torch's name for it; None for one that is not known."""
    words = gpu_name.replace("-", " ").split()
    known = [name for name in PEAK_FLOPS if all(part in words for part in name.split())]
    if not known:
        return None
    name = max(known, key=len)
    others = [word for word in words if word not in name.split() and not _SAYS_NOTHING.fullmatch(word)]
    return None if others else PEAK_FLOPS[name]  # a Laptop, Ti or NVL is another chip


def flops_per_token(parameters: Parameters, mean_square_length: float, recomputed: bool) -> float:
    """Return the FLOPs of training one token with a frozen base.

    mean_square_length: sum(length^2) / sum(length) of the rows, in tokens: what attention costs a token.
    recomputed: gradient checkpointing, one more forward pass of the body.
    A forward pass costs 2 a parameter, the backward pass to the inputs 2, and 2 more for weights that are trained.
    """
    attention = 2 * mean_square_length * parameters.attention_width * parameters.layers  # causal: half of 4 s d
    flops = 4 * (parameters.body + parameters.head) + 6 * parameters.trainable + 3 * attention
    return flops + (2 * parameters.body + attention if recomputed else 0)


class Metrics(TrainerCallback):
    """Completes Trainer's logs and writes them to metrics.jsonl (on rank 0)."""

    def __init__(self, file: Path, trainer: Any, parameters: Parameters, recomputed: bool) -> None:
        self.file, self.trainer, self.parameters, self.recomputed = file, trainer, parameters, recomputed
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak = peak_flops(name)
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._idle, self._waited = self.trainer.idle_s, self.trainer.data_wait_s
        self._tokens = self._trained = self._squares = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget lines past the step that is resumed from: they are about to be trained again."""
        self._start()
        if state.is_world_process_zero and self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            write_atomically(self.file, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the tokens of the global batch just trained; every rank knows them without asking the others."""
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever logging_steps is, the last step's numbers are kept
        order = self.trainer.order
        units = order.step(*divmod(state.global_step - 1, order.steps_per_epoch))
        rows = [row for unit in units for row in unit]
        lengths = order.lengths[rows].astype("int64")
        self._tokens += int(lengths.sum())
        self._squares += int((lengths**2).sum())
        self._trained += int(self.trainer.train_side.trained_lengths[rows].sum())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Add throughput, MFU, memory and waiting to a training log; write any log down."""
        if "train_runtime" in logs:  # Trainer's summary at the end, of which all is known
            logs.clear()
            return
        if "loss" in logs:
            seconds = time.perf_counter() - self._since - (self.trainer.idle_s - self._idle)
            logs["tokens_per_s"] = self._tokens / seconds
            logs["trained_tokens_per_s"] = self._trained / seconds
            if self.peak:
                per_token = flops_per_token(self.parameters, self._squares / self._tokens, self.recomputed)
                logs["mfu"] = logs["tokens_per_s"] * per_token / (self.peak * args.world_size)
            logs["peak_memory_gb"] = _peak_memory_bytes() / 1e9
            logs["data_wait_s"] = self.trainer.data_wait_s - self._waited
            self._start()
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs, "time": time.time()}) + "\n")


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
