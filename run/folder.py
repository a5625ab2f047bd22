"""The run folder: the one owner of its paths, and its lock. history.py has what happened to the run."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qwenlora.configs.load import load_config, to_yaml
from qwenlora.configs.paths import located
from qwenlora.configs.schema import Config
from qwenlora.run import code
from qwenlora.run.changes import Changes, changes
from qwenlora.run.disk import write_atomically
from qwenlora.run.history import History
from qwenlora.run.records import Code, Facts, Paces, RankError, Reason

PREFLIGHT = 0  # in place of an attempt's number, for checks without an attempt
PREPARE_ONLY = "--prepare-only"  # makes trainer/main.py prepare, and train nothing


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
        self.profile = self.path / "profile"  # of log.profile_steps
        self.paces = self.path / "ranks.json"  # how fast each rank is
        self.adapter = self.path / "adapter"
        self.base_model = self.path / "base_model"  # of model.name_or_path: tiny
        self.facts = self.path / "facts.json"  # counts made before the ranks start
        self.bad_rows = self.path / "bad_rows.txt"
        self.comparison = self.path / "comparison.json"  # of `qwenlora compare`
        self.report = self.path / "report.html"  # of `qwenlora report`
        self.wandb_id = self.path / "wandb" / "run_id"
        self.wandb_url = self.path / "wandb" / "url"  # of a run that is online
        self.exit_code = self.path / ".exit-code"  # of a job that has lost nodes, for its batch shell
        self._lock = self.path / ".lock"
        self._before: dict[Path, str | None] = {}  # the files' text before this attempt

    def tracked(self, name: str) -> Path:
        """Return the folder in which a tracker of log.to keeps its files."""
        return self.path / name

    @property
    def submitted(self) -> Path:
        """The folder of the run's jobs: beside the run folder, since jobs exist before it does."""
        return self.path.parent / ".submitted" / self.path.name

    def cache(self, config: Config) -> Path:
        """Return the folder in which prepared rows are kept, for all runs beside this one."""
        return Path(config.data.cache_dir or self.path.parent / ".prepared").expanduser().absolute()

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, newest first, whole or not."""
        folders = self.path.glob("checkpoint-*")
        numbered = [path for path in folders if path.name.removeprefix("checkpoint-").isdecimal()]
        return sorted(numbered, key=step_of, reverse=True)

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
        """Return the errors that failed processes of an attempt have recorded."""
        return [RankError.read(file) for file in self.logs(attempt).glob("*.error.json")]

    def read_facts(self) -> Facts:
        """Return the facts that preparation recorded. Raises: OSError or ValueError for a bad facts.json."""
        return Facts.read(self.facts)

    def write_facts(self, facts: Facts) -> None:
        """Write facts.json."""
        write_atomically(self.facts, facts.text())

    def read_paces(self) -> Paces | None:
        """Return how fast the ranks are; None where there is but one, or the file is damaged."""
        try:
            return Paces.read(self.paces)
        except (OSError, ValueError):
            return None

    def read_config(self) -> Config:
        """Return the config of the last attempt, with relative names of models and rows located. Raises:
        ValueError for a bad config.yaml."""
        return located(load_config(self.config), self.started_in())

    def started_in(self) -> list[Path]:
        """Return where the last attempt may have been started: the folder that has this one as its run_dir,
        also when both were moved; the one on record; the working directory."""
        found = []
        with suppress(OSError, ValueError):
            named = Path(load_config(self.config).run_dir)
            if not named.is_absolute() and self.path.parts[-len(named.parts) :] == named.parts:
                found.append(Path(*self.path.parts[: -len(named.parts)]))
        with suppress(OSError, ValueError):
            if recorded := Code.read(self.code).folder:
                found.append(Path(recorded))
        return [*found, Path.cwd()]

    def flight_recorder(self, attempt: int) -> str:
        """Return the path prefix of NCCL's dumps of its last collectives; the rank's number follows."""
        return f"{self.logs(attempt)}/nccl-rank-"

    def begin_attempt(self, processes: int, *, killed_by: str = "", **facts: Any) -> int:
        """Record an attempt's start (History.begin) and make its log folder; return its number, from 1."""
        number = self.history.begin(processes, killed_by=killed_by, **facts)
        self.logs(number).mkdir(parents=True, exist_ok=True)
        self.paces.unlink(missing_ok=True)  # of other ranks
        return number

    def end_attempt(self, reason: Reason, message: str = "") -> None:
        """Record why the last attempt ended, unless that is known."""
        with self._recording():
            self.history.end(reason, message)

    def note_attempt(self, **facts: Any) -> None:
        """Add to the record of the last attempt. facts: fields of Attempt."""
        with self._recording():
            self.history.note(**facts)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Warn when the history cannot be written: no attempt fails for that."""
        try:
            yield
        except OSError as error:
            print(f"warning: {self.history.file} cannot be written: {error.strerror}", file=sys.stderr)

    @property
    def trained(self) -> bool:
        """Whether training has written anything here."""
        return self.metrics.exists() or self.adapter.exists() or bool(self.checkpoints())

    @property
    def done(self) -> bool:
        """Whether the run has ended and its adapter exists."""
        attempts = [attempt for attempt in self.history.attempts() if attempt.reason != "refused"]
        return self.adapter.is_dir() and bool(attempts) and attempts[-1].reason == "done"

    @contextmanager
    def claim(
        self, config: Config, *, fresh: bool = False, allowed: Sequence[str] = (), wait_s: float = 0.0
    ) -> Iterator[Changes]:
        """Lock the folder for one attempt, made if needed; yield the config's changes since the last attempt.

        The lock keeps out processes of this machine and, where the file system supports flock, of other
        machines. fresh: set an earlier run aside; allowed: further config keys that may differ; wait_s: how
        long to wait for the lock, since a requeued job may start before its last processes have ended.
        Raises: ValueError when the folder holds a run with another config or something else, or is in use.
        """
        self._check_place()
        if fresh and self.config.exists():
            with self._locked(wait_s):
                self._set_aside()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        with self._locked(wait_s):
            changed = self._changes(config, allowed) if self.trained else Changes()
            files = (self.config, self.facts, self.code, self.diff) if self.trained else ()
            self._before = {
                file: file.read_text("utf-8", "replace") if file.exists() else None for file in files
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
        """Raise the ValueError that claim would raise; change nothing."""
        self._check_place()
        if self.trained and not fresh:
            self._changes(config, allowed)

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; choose another run_dir")
        if self._is_something_else():
            raise ValueError(f"run_dir={self.path} is not empty and holds no run; choose another run_dir")

    def put_back(self) -> None:
        """Restore config, facts and code of earlier attempts, after an attempt that has trained nothing."""
        for file, text in self._before.items():
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
        folder, number = self.path.resolve(), 1  # a link's target is renamed, and stays on its disk
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        folder.mkdir()

    def _changes(self, config: Config, allowed: Sequence[str]) -> Changes:
        try:
            before = load_config(self.config)
        except ValueError as error:
            raise ValueError(
                f"run_dir={self.path} holds a run whose config cannot be read ({error}); choose another"
                " run_dir, or --fresh to set the old run aside"
            ) from None
        changed = changes(before, config)
        if refused := changed.refused(allowed):
            raise ValueError(
                f"run_dir={self.path} holds a run with another config: {refused}; choose another run_dir, or"
                f" set the old run aside with --fresh (to go on all the same: {refused.permit})"
            )
        return changed

    @property
    def abandoned(self) -> bool:
        """Whether the process that last locked the folder ran on this machine, and has ended."""
        return self.holder is not None and not Path("/proc", str(self.holder)).exists()

    @property
    def holder(self) -> int | None:
        """The pid that last locked the folder, if that process ran on this machine; else None."""
        words = self._lock.read_text().split() if self._lock.exists() else []  # process PID on HOST
        return int(words[1]) if len(words) == 4 and words[3] == socket.gethostname() else None

    @property
    def is_locked(self) -> bool:
        """Whether another process holds the lock, and this machine's file system says so."""
        try:
            with self._lock.open("a+") as file:
                return not _lock(file)
        except OSError:
            return False

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
    """Lock a file; return False when another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        # a file system without locks (Lustre without -o flock) keeps nobody out
    return True


def meant(name: str) -> str:
    """Return the end of a message about a run that was named without the folder of runs; else nothing."""
    is_there = not Path(name).is_absolute() and Path("runs", name, "config.yaml").is_file()
    return f"; did you mean runs/{name}?" if is_there else ""


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a run's checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
