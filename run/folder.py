"""The run folder: where everything of a run lies, and whose it is.

RunFolder is the one owner of these paths; what happened to the run is history.py's.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qwenlora.configs.keys import differences
from qwenlora.configs.load import load_config, to_yaml
from qwenlora.configs.schema import Config
from qwenlora.run import code
from qwenlora.run.disk import write_atomically
from qwenlora.run.history import History
from qwenlora.run.records import Facts, RankError, Reason

PREFLIGHT = 0  # in place of an attempt's number: only checks before a start
PREPARE_ONLY = "--prepare-only"  # what a rank's module is told that only prepares

# what may change between two attempts without making it another run: how it is watched, started, spread over
# GPUs, cut into micro-batches, evaluated, saved, and how long it goes on
FREE_TO_CHANGE = (
    "run_dir",
    "log.",
    "launch.",
    "checkpoint.",
    "data.num_proc",
    "data.cache_dir",
    "strategy.name",
    "strategy.offload",
    "strategy.shard_group",
    "strategy.sequence_parallel",
    "strategy.deepspeed_config",
    "train.eval_",
    "train.gradient_checkpointing",
    "train.max_steps",
    "train.max_time_min",
    "train.metric_for_best_model",
    "train.num_train_epochs",
    "train.on_nan",
    "train.per_device_",
    "train.save_",
)


class RunFolder:
    """One run's folder, whether it exists yet or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.code = self.path / "code.json"
        self.diff = self.path / "code.diff"
        self.deepspeed = self.path / "deepspeed.json"
        self.history = History(self.path)
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.base_model = self.path / "base_model"  # of model.name_or_path: tiny
        self.facts = self.path / "facts.json"  # what was counted before the ranks started
        self.bad_rows = self.path / "bad_rows.txt"
        self.comparison = self.path / "comparison.json"  # of `qwenlora compare`
        self.report = self.path / "report.html"  # of `qwenlora report`
        self.wandb_id = self.path / "wandb" / "run_id"
        self.wandb_url = self.path / "wandb" / "url"  # of a run that is online
        self._lock = self.path / ".lock"
        self._held: dict[Path, str | None] = {}  # what says how it was trained, as it was before this attempt

    @property
    def submitted(self) -> Path:
        """The folder of all that belongs to the run's jobs, which is there before the run folder is: beside
        it."""
        return self.path.parent / ".submitted" / self.path.name

    def cache(self, config: Config) -> Path:
        """Return the folder in which prepared rows are kept, for all runs beside this one."""
        return Path(config.data.cache_dir or self.path.parent / ".prepared").expanduser().absolute()

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, newest first, whole or not."""
        found = [
            path
            for path in self.path.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdecimal()
        ]
        return sorted(found, key=step_of, reverse=True)

    def logs(self, attempt: int) -> Path:
        """Return the folder of an attempt's logs."""
        return self.path / "logs" / (f"attempt-{attempt}" if attempt != PREFLIGHT else "preflight")

    def log(self, attempt: int, process: str) -> Path:
        """Return the file that a process (launch, prepare, rank-0 ...) writes everything to."""
        return self.logs(attempt) / f"{process}.log"

    def error(self, attempt: int, process: str) -> Path:
        """Return the file in which a failing process says why (RankError)."""
        return self.logs(attempt) / f"{process}.error.json"

    def errors(self, attempt: int) -> list[RankError]:
        """Return why the processes of an attempt failed that could say so."""
        return [RankError.read(file) for file in self.logs(attempt).glob("*.error.json")]

    def read_facts(self) -> Facts:
        """Return what preparation counted. Raises: OSError or ValueError when facts.json cannot be read."""
        return Facts.read(self.facts)

    def write_facts(self, facts: Facts) -> None:
        """Write facts.json."""
        write_atomically(self.facts, facts.text())

    def flight_recorder(self, attempt: int) -> str:
        """Return the beginning of the names of NCCL's dumps of its last collectives; the rank's number
        follows."""
        return f"{self.logs(attempt)}/nccl-rank-"

    def begin_attempt(self, processes: int, *, killed_by: str = "", **facts: Any) -> int:
        """Note the start of an attempt and make room for its logs; return its number, from 1.

        killed_by: what ended an earlier one that could not say so, in Slurm's word. facts: of this one.
        """
        number = self.history.begin(processes, killed_by=killed_by, **facts)
        self.logs(number).mkdir(parents=True, exist_ok=True)
        return number

    def end_attempt(self, reason: Reason, message: str = "") -> None:
        """Note why the last attempt ended, unless that is known."""
        with self._noting():
            self.history.end(reason, message)

    def note_attempt(self, **facts: Any) -> None:
        """Add to what is known of the last attempt."""
        with self._noting():
            self.history.note(**facts)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """On a full disk, or without a folder, say so: no attempt fails for its history."""
        try:
            yield
        except OSError as error:
            print(f"warning: {self.history.file} cannot be written: {error.strerror}", file=sys.stderr)

    @property
    def trained(self) -> bool:
        """Whether there is anything here that training made."""
        return self.metrics.exists() or self.adapter.exists() or bool(self.checkpoints())

    @property
    def done(self) -> bool:
        """Whether the run has ended and its adapter is there."""
        attempts = [attempt for attempt in self.history.attempts() if attempt.reason != "refused"]
        return self.adapter.is_dir() and bool(attempts) and attempts[-1].reason == "done"

    @contextmanager
    def claim(
        self, config: Config, *, fresh: bool = False, allowed: Sequence[str] = (), wait_s: float = 0.0
    ) -> Iterator["Changes"]:
        """Hold the folder for one attempt: make it, or reopen it for another attempt at the same run.

        Yields what changed in the config since the last attempt. Other processes of this machine are kept out
        while the block runs, and where the file system knows flock, those of other machines too.
        fresh: set what is there aside and start anew. allowed: keys in which the config may differ besides.
        wait_s: how long to wait for who has it: a requeued job may start before its last processes are gone.
        Raises: ValueError when the folder holds a run with another config, is something else's, or is in use.
        """
        self._check_place()
        if fresh and self.config.exists():
            with self._locked(wait_s):
                self._set_aside()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        with self._locked(wait_s):
            changed = self._changes(config, allowed) if self.trained else Changes()
            said = (self.config, self.facts, self.code, self.diff) if self.trained else ()
            self._held = {
                file: file.read_text("utf-8", "replace") if file.exists() else None for file in said
            }
            with self._writing():
                write_atomically(self.config, to_yaml(config))
                code.record(self.code, self.diff)
            try:
                yield changed
            except ValueError:
                self.put_back()
                raise

    def check(self, config: Config, *, fresh: bool = False, allowed: Sequence[str] = ()) -> None:
        """Refuse what claim would refuse, and touch nothing. Raises: ValueError."""
        self._check_place()
        if self.trained and not fresh:
            self._changes(config, allowed)

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; choose another run_dir")
        if self._is_something_else():
            raise ValueError(f"run_dir={self.path} is not empty and holds no run; choose another run_dir")

    def put_back(self) -> None:
        """Put back config, facts and code of the attempts so far: one that trains nothing is not what made
        the run."""
        for file, text in self._held.items():
            if text is None:
                file.unlink(missing_ok=True)
            else:
                write_atomically(file, text)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"cannot write to run_dir={self.path}: {error.strerror}; choose another run_dir"
            ) from None

    def _is_something_else(self) -> bool:
        if not self.path.is_dir() or self.config.exists():
            return False
        return any(path != self._lock for path in self.path.iterdir())

    def _set_aside(self) -> None:
        there, number = self.path.resolve(), 1  # behind a link, where the disk is that was meant
        while (aside := there.with_name(f"{there.name}.old-{number}")).exists():
            number += 1
        there.rename(aside)
        there.mkdir()

    def _changes(self, config: Config, allowed: Sequence[str]) -> "Changes":
        try:
            held = load_config(self.config)
        except ValueError as error:
            raise ValueError(
                f"run_dir={self.path} holds a run whose config cannot be read ({error}); choose another"
                " run_dir, or --fresh to set the old run aside"
            ) from None
        changed = changes(held, config)
        if refused := changed.refused(allowed):
            raise ValueError(
                f"run_dir={self.path} holds a run with another config: {refused}; choose another run_dir, or"
                f" set the old run aside with --fresh (to go on all the same: {refused.permit})"
            )
        return changed

    @property
    def abandoned(self) -> bool:
        """Whether the process that last held the folder was one of this machine, and is gone."""
        return self.holder is not None and not Path("/proc", str(self.holder)).exists()

    @property
    def holder(self) -> int | None:
        """The process of this machine that holds the folder, or last held it; None when it is another
        machine's."""
        held = self._lock.read_text().split() if self._lock.exists() else []  # process PID on HOST
        return int(held[1]) if len(held) == 4 and held[3] == socket.gethostname() else None

    @contextmanager
    def _locked(self, wait_s: float = 0.0) -> Iterator[None]:
        with self._writing():
            file = self._lock.open("a+")
        end = time.monotonic() + wait_s
        with file:
            while not _lock(file):
                if time.monotonic() >= end:
                    file.seek(0)
                    raise ValueError(f"run_dir={self.path} is in use by {file.read().strip()}")
                time.sleep(0.5)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def _lock(file: IO[str]) -> bool:
    """Lock a file, unless another process has it; return whether it is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        # a file system without locks (Lustre without -o flock): nobody is kept out
    return True


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a run's checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


class Changes(dict[str, tuple[Any, Any]]):
    """{key: (was, is now)} of two configs."""

    def refused(self, allowed: Sequence[str] = ()) -> "Changes":
        """Return those that make another run. allowed: keys, or sections, that may change all the same."""
        free = [
            key for key in self if key.startswith(FREE_TO_CHANGE) or {key, key.split(".")[0]} & set(allowed)
        ]
        return Changes({key: values for key, values in self.items() if key not in free})

    def __str__(self) -> str:
        return ", ".join(
            f"{key} was {_as_yaml(old)}, now {_as_yaml(new)}" for key, (old, new) in self.items()
        )

    @property
    def length(self) -> bool:
        """Whether they make the run longer or shorter."""
        return bool({"train.max_steps", "train.num_train_epochs"} & set(self))

    @property
    def permit(self) -> str:
        """How the user lets them pass."""
        return " ".join(f"--allow-config-change {key}" for key in self)


def _as_yaml(value: Any) -> str:
    known = {None: "null", True: "true", False: "false"}
    return known[value] if value is None or isinstance(value, bool) else str(value)


def allows(section: str, allowed: Sequence[str]) -> bool:
    """Whether what the user allows to change opens the rows (section data), or the base's weights (model), to
    change.

    A key that is free to change anyway says nothing of them.
    """
    if section in allowed:
        return True
    if section == "model":
        return bool({"model.name_or_path", "model.revision"} & set(allowed))
    return any(key.startswith(f"{section}.") and not key.startswith(FREE_TO_CHANGE) for key in allowed)


def changes(held: Config, config: Config) -> Changes:
    """Return in what config differs from a held one, where the run folder lies left out."""
    return Changes({key: values for key, values in differences(held, config).items() if key != "run_dir"})
