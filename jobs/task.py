"""The part of a submitted job on a node: submitit pickles a RunTask, and calls it whenever the job starts."""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import NotRequired, TypedDict

from submitit import JobEnvironment
from submitit.core.utils import JobPaths, cloudpickle_dump, temporary_save_path

from qwenlora.configs import load_config
from qwenlora.jobs.find import state
from qwenlora.launch import agent
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.metrics_file import last_line
from qwenlora.run.records import Reason
from qwenlora.run.signals import STOP_SIGNALS, to_handle, under_nohup
from qwenlora.run.state import RunState
from qwenlora.trainer import main as trainer


class Summary(TypedDict):
    """How a run stands. adapter: its folder; reason: of the last attempt; state: as `qwenlora status` has it,
    but Slurm is not asked; loss, eval_loss: the last ones logged; goodput: the share of time in steps."""

    run_dir: str
    adapter: str | None
    reason: Reason | None
    state: RunState
    step: int
    loss: NotRequired[float]
    eval_loss: NotRequired[float]
    attempts: int
    goodput: float | None


@dataclass(frozen=True)
class RunTask:
    """The agent on config_file, as a callable. Fields keep their names: jobs that wait hold pickles of them.
    brought_back: Slurm restarts it after exit code 75; fresh (only the first time), allowed: as for run."""

    config_file: str
    brought_back: bool
    fresh: bool = False
    allowed: tuple[str, ...] = ()

    def __call__(self) -> Summary | None:
        """Return the run's summary, on the first node; None on the others. Raises: SystemExit(75) to have the
        job brought back, ValueError when the run was refused, RuntimeError when it failed."""
        # submitit's own handlers would requeue at once, or do nothing
        for number in to_handle(nohup=under_nohup()):
            signal.signal(number, _leave)
        config = load_config(self.config_file)
        code = agent.run(config, fresh=self.fresh, allowed=self.allowed)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # only the result has yet to be written
        return _outcome(RunFolder(config.run_dir), code, brought_back=self.brought_back)


Attempt = RunTask  # the name in pickles of version 0.1, which jobs that wait may still hold


@dataclass(frozen=True)
class InProcess:
    """The run of config_file in the process that asks for the result, on the screen: for a debugger."""

    config_file: str

    def __call__(self) -> Summary | None:
        """Return as RunTask does. Raises: any exception of the training, with its traceback."""
        code = trainer.main([self.config_file], captured=False)
        return _outcome(RunFolder(load_config(self.config_file).run_dir), code, brought_back=False)


def summary(run: RunFolder) -> Summary:
    """Return how a run stands."""
    attempts = run.history.attempts()
    last = attempts[-1] if attempts else None
    result = Summary(
        run_dir=str(run.path),
        adapter=str(run.adapter) if run.adapter.is_dir() else None,
        reason=last.reason if last else None,
        state=state(run, attempts, job=None),
        step=run.history.last_step(),
        attempts=len(attempts),
        goodput=last.goodput if last else None,
    )
    if line := last_line(run.metrics, "loss"):
        result["loss"] = line["loss"]
    if line := last_line(run.metrics, "eval_loss"):
        result["eval_loss"] = line["eval_loss"]
    return result


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_CODES["stopped"])


def _leave_without_traceback(code: int) -> None:
    """Make an exception that ends this process exit with code, and print nothing: the agent has reported."""

    def leave(*_: object) -> None:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)

    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        sys.excepthook = leave


def _write_result_of_the_first(result: Summary) -> None:
    """Write what the first node's process would have returned, in whose place this one leads: job.result()
    reads that."""
    paths = JobPaths(os.environ["SUBMITIT_FOLDER"], JobEnvironment().job_id, 0)
    with temporary_save_path(paths.result_pickle) as path:
        cloudpickle_dump(("success", result), path)


def _outcome(run: RunFolder, code: int, *, brought_back: bool) -> Summary | None:
    """Turn the agent's exit code into a result, or an exception."""
    if code == EXIT_CODES["stopped"] and brought_back:
        raise SystemExit(code)  # no Exception: submitit writes no result, and the batch shell sees the code
    if code in (EXIT_CODES["done"], EXIT_CODES["stopped"]):
        if os.environ.get("SLURM_PROCID", "0") == "0":
            return summary(run)
        if run.holder == os.getpid():
            _write_result_of_the_first(summary(run))
        return None
    attempts = run.history.attempts()
    message = (attempts[-1].message if attempts else "") or f"the agent ended with exit code {code}"
    _leave_without_traceback(code)
    if code == EXIT_CODES["refused"]:
        raise ValueError(message)
    raise RuntimeError(f"{message}; logs: {run.logs(len(attempts))}")
