"""The run folder: where everything of a run lies, whose it is, and what happened to it.

RunFolder is the one owner of these paths. Its history is attempts.jsonl, one line an attempt:
{"attempt", "start", "end", "host", "job_id", "processes", "first_step", "last_step", "reason", "message"}
with reason done, stopped, failed or refused; a line without an end is an attempt that was killed.
"""

import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from qwenlora.configs.load import differences, load_config, to_yaml
from qwenlora.configs.schema import Config
from qwenlora.jobs.disk import write_atomically

Reason = Literal["done", "stopped", "failed", "refused"]
PREPARE_ONLY = "--prepare-only"  # what a rank's module is told that only prepares
EXIT_CODES: dict[Reason, int] = {"done": 0, "stopped": 75, "failed": 1, "refused": 2}

# what may change between two attempts without making it another run
FREE_TO_CHANGE = (
    "run_dir",
    "log.",
    "launch.",
    "data.num_proc",
    "data.cache_dir",
    "train.per_device_eval_batch_size",
    "train.save_total_limit",
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "qwenlora")


class RunFolder:
    """One run's folder, whether it exists yet or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.code = self.path / "code.json"
        self.attempts = self.path / "attempts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.base_model = self.path / "base_model"  # of model.name_or_path: tiny
        self.facts = self.path / "facts.json"  # what was counted before the ranks started
        self.bad_rows = self.path / "bad_rows.txt"
        self.wandb_id = self.path / "wandb" / "run_id"
        self._lock = self.path / ".lock"

    def cache(self, config: Config) -> Path:
        """Return the folder in which prepared rows are kept, for all runs beside this one."""
        return Path(config.data.cache_dir or self.path.parent / ".prepared").expanduser().absolute()

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, newest first, whole or not."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
        return sorted(found, key=step_of, reverse=True)

    def logs(self, attempt: int) -> Path:
        """Return the folder of an attempt's logs."""
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, process: str) -> Path:
        """Return the file that a process (launch, prepare, rank-0 ...) writes everything to."""
        return self.logs(attempt) / f"{process}.log"

    def error(self, attempt: int, process: str) -> Path:
        """Return the file in which a failing process says why: {"time", "message", "code"}."""
        return self.logs(attempt) / f"{process}.error.json"

    @property
    def trained(self) -> bool:
        """Whether there is anything here that training made."""
        return self.metrics.exists() or self.adapter.exists() or bool(self.checkpoints())

    @property
    def done(self) -> bool:
        """Whether the run has ended and its adapter is there."""
        return self.adapter.is_dir() and any(attempt.get("reason") == "done" for attempt in self.history())

    @contextmanager
    def claim(self, config: Config, *, fresh: bool = False) -> Iterator[None]:
        """Hold the folder for one attempt: make it, or reopen it for another attempt at the same run.

        fresh: set what is there aside and start anew. Other processes of this machine are kept out while the block
        runs, and where the file system knows flock, those of other machines too.
        Raises: ValueError when the folder holds a run with another config, is something else's, or is in use.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; choose another run_dir")
        if self._is_something_else():
            raise ValueError(f"run_dir={self.path} is not empty and holds no run; choose another run_dir")
        if fresh and self.config.exists():
            with self._locked():
                self._set_aside()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self.trained:
                self._refuse_another_config(config)
            with self._writing():
                write_atomically(self.config, to_yaml(config))
                write_atomically(self.code, json.dumps(_code(), indent=1))
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"cannot write to run_dir={self.path}: {error.strerror}; choose another run_dir") from None

    def _is_something_else(self) -> bool:
        if not self.path.is_dir() or self.config.exists():
            return False
        return any(path != self._lock for path in self.path.iterdir())

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)

    def _refuse_another_config(self, config: Config) -> None:
        try:
            held = load_config(self.config)
        except ValueError as error:
            raise ValueError(
                f"run_dir={self.path} holds a run whose config cannot be read ({error}); choose another run_dir, or"
                " --fresh to set the old run aside"
            ) from None
        if changed := changes(held, config):
            raise ValueError(
                f"run_dir={self.path} holds a run with another config: {changed};"
                " choose another run_dir, or --fresh to set the old run aside"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._writing():
            file = self._lock.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(f"run_dir={self.path} is in use by {file.read().strip()}") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                # a file system without locks (Lustre without -o flock): nobody is kept out
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def history(self) -> list[dict[str, Any]]:
        """Return the attempts so far, oldest first."""
        if not self.attempts.exists():
            return []
        return [json.loads(line) for line in self.attempts.read_text().splitlines() if line.strip()]

    def begin_attempt(self, processes: int) -> int:
        """Note the start of an attempt; return its number, from 1."""
        history = self.history()
        number = len(history) + 1
        history.append(
            {
                "attempt": number,
                "start": _now(),
                "host": socket.gethostname(),
                "job_id": os.environ.get("SLURM_JOB_ID"),
                "processes": processes,
            }
        )
        self._write_history(history)
        self.logs(number).mkdir(parents=True, exist_ok=True)
        return number

    def end_attempt(self, reason: Reason, message: str = "", steps: dict[str, int] | None = None) -> None:
        """Note why the last attempt ended, unless that is known already. steps: first_step, last_step."""
        history = self.history()
        if "end" not in history[-1]:
            history[-1] |= {"end": _now(), "reason": reason, "message": message, **(steps or {})}
            self._write_history(history)

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        lines = [json.dumps(attempt, ensure_ascii=False) + "\n" for attempt in history]
        write_atomically(self.attempts, "".join(lines))


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a run's checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def changes(held: Config, config: Config) -> str:
    """Return in words how config would make another run of a held one; empty when it would not."""
    found = differences(held, config).items()
    return ", ".join(f"{key} was {old}, now {new}" for key, (old, new) in found if not key.startswith(FREE_TO_CHANGE))


def _code() -> dict[str, Any]:
    """Return what ran: the git commit (of the working directory, if any), versions and the command."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"git": _git(), "versions": versions, "python": platform.python_version(), "command": sys.argv}


def _git() -> str | None:
    if not shutil.which("git"):
        return None
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
