"""metrics.jsonl: one line for each logging step and evaluation, always written. Metrics adds what Trainer
does not know (throughput, MFU, memory, waiting) to each of Trainer's logs. The callbacks after it (progress,
W&B) show the same numbers."""

import errno
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from qwenlora.plan.flops import flops
from qwenlora.plan.hardware import of_driver
from qwenlora.run.history import ProgressFile
from qwenlora.run.records import Work

log = logging.getLogger("qwenlora")

Logs = dict[str, float]  # Trainer's, as callbacks get them
PHASES = ("data_wait_s", "evaluating_s", "saving_s")  # LoraTrainer's clocks, beside that of the steps
Line = dict[str, float]  # of metrics.jsonl: "step", "time" (seconds since 1970), and numbers by their names

_BLOCK = 2**16  # bytes read at once from the end of the file


class MetricsFile:
    """metrics.jsonl: whole lines only, and never a step twice. warn: shows a line to the user."""

    def __init__(self, path: Path, warn: Callable[[str], None] = log.warning) -> None:
        self.path, self.warn = path, warn
        self._waiting: list[str] = []  # lines that could not be written

    def append(self, line: Line) -> None:
        """Add a line. If it cannot be written, it is kept and written with a later one."""
        self._waiting.append(json.dumps(line) + "\n")
        if (failure := self.flush()) and len(self._waiting) == 1:
            self.warn(f"{self.path.name} cannot be written ({failure}): its lines are kept until it can be")

    def flush(self) -> str:
        """Write the lines that wait; return why that failed, or an empty string."""
        data = "".join(self._waiting).encode()
        try:
            if data:
                with self.path.open("ab", buffering=0) as file:
                    end = file.seek(0, os.SEEK_END)
                    if file.write(data) != len(data):
                        file.truncate(end)  # no half line
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return str(error.strerror)
        self._waiting.clear()
        return ""

    def close(self) -> None:
        """Write the lines that wait, or warn of how many are lost."""
        if failure := self.flush():
            self.warn(f"{len(self._waiting)} lines of {self.path.name} are lost: {failure}")

    def forget_after(self, step: int, *, evaluation_too: bool = False) -> None:
        """Remove the lines after a step, from which training resumes. evaluation_too: also the step's own
        evaluation, which will be repeated. It reads from the end: a long history costs nothing."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = keep = file.seek(0, os.SEEK_END)
            for start, text in _lines_backwards(file, end):
                line = _parse(text)
                again = evaluation_too and line and line["step"] == step and "eval_loss" in line
                if line and line["step"] <= step and not again:
                    break
                keep = start
            file.truncate(keep)

    def since(self, step: int) -> Iterator[Line]:
        """Yield the lines from a step on, oldest first."""
        if not self.path.exists():
            return
        lines = []
        with self.path.open("rb") as file:
            for _, text in _lines_backwards(file, file.seek(0, os.SEEK_END)):
                if (line := _parse(text)) and line["step"] < step:
                    break
                lines += [line] if line else []
        yield from reversed(lines)


def _parse(text: bytes) -> Line | None:
    """Return a line of metrics.jsonl; None for half a line."""
    try:
        line: Line | None = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return line


def _lines_backwards(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line's start in the file and its bytes with the newline, from the last line to the first."""
    rest, position = b"", end
    while position > 0:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        rest = file.read(size) + rest
        while (cut := rest.rfind(b"\n", 0, -1)) >= 0:  # the last byte ends the last line
            yield position + cut + 1, rest[cut + 1 :]
            rest = rest[: cut + 1]
    if rest:
        yield 0, rest


class Metrics(TrainerCallback):
    """Completes Trainer's logs, writes them to metrics.jsonl, and writes each step to progress.json. file,
    progress: None except on rank 0; trainer: a LoraTrainer; work: None if unknown, and MFU with it."""

    def __init__(
        self,
        file: MetricsFile | None,
        trainer: Any,
        work: Work | None,
        progress: ProgressFile | None = None,
        attempt: int = 0,
    ) -> None:
        self.file, self.trainer, self.work = file, trainer, work
        self.progress, self.attempt = progress, attempt
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        gpu = of_driver(name)
        self.peak = gpu.flops if gpu else None
        self._begun = time.perf_counter()
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._phases, self._idle_s = self._seconds_of_phases(), self.trainer.idle_s
        self._tokens = self._trained = 0
        self._flops = 0.0

    def _seconds_of_phases(self) -> dict[str, float]:
        return {name: getattr(self.trainer, name) for name in PHASES}

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()
        self._start()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Count the tokens of the global batch just trained; every rank knows all its rows from the order."""
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step is logged whatever logging_steps is
        order = self.trainer.order
        rows = order.rows(state.global_step - 1)
        lengths = order.lengths[rows].astype("int64")
        self._tokens += int(lengths.sum())
        trained = int(self.trainer.train_side.trained_lengths[rows].sum())
        self._trained += trained
        self._flops += flops(self.work, lengths, trained) if self.work else 0
        if self.progress:
            saving = self.trainer.saving_s
            self.progress.write(
                self.attempt, state.global_step, time.perf_counter() - self._begun - saving, saving
            )

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs, **_: object) -> None:
        """Add throughput, MFU, memory and seconds by phase to a training log; write every log."""
        if "train_runtime" in logs:  # Trainer's summary at the end, which says nothing new
            logs.clear()
            return
        if "loss" in logs:
            seconds = time.perf_counter() - self._since - (self.trainer.idle_s - self._idle_s)
            logs["tokens_per_s"] = self._tokens / seconds
            logs["trained_tokens_per_s"] = self._trained / seconds
            if self.peak and self.work:
                logs["mfu"] = self._flops / seconds / (self.peak * self.trainer.args.world_size)
            logs["peak_memory_gb"] = _peak_memory_bytes() / 1e9
            now = self._seconds_of_phases()
            phases = {name: now[name] - before for name, before in self._phases.items()}
            logs |= {"compute_s": seconds - phases["data_wait_s"], **phases}
            self._start()
        if self.file:
            self.file.append({"step": state.global_step, **logs, "time": time.time()})


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
