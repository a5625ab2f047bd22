"""What a submitted job runs, once a node: an attempt at the run of a config file. Its exit code is all that
decides.

submitit pickles an Attempt when it is submitted and calls it when the job starts, each time that it starts.
"""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from qwenlora.configs import load_config
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.metrics_file import last_line

# the agent (launch/children.py) hears the same ones, as soon as there is something to stop
_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Attempt:
    """The agent on config_file, as a callable. brought_back: whether Slurm starts it again when it asks for
    that.

    fresh: set an earlier run aside, the first time; allowed: config keys that may differ from the run's so
    far.
    """

    config_file: str
    brought_back: bool
    fresh: bool = False
    allowed: tuple[str, ...] = ()

    def __call__(self) -> dict[str, Any] | None:
        """Return the run's summary, on the first node; None on the others.

        Raises: SystemExit(75) when the job is to be brought back, ValueError when the run was refused,
        RuntimeError when it failed.
        """
        from qwenlora.launch import agent  # jobs/ is below launch/: only a job that runs comes to it

        # submitit's own answers to signals are to requeue at once, or nothing at all
        for number in _REQUESTS:
            signal.signal(number, _leave)
        config = load_config(self.config_file)
        code = agent.run(config, fresh=self.fresh, allowed=self.allowed)
        for number in _REQUESTS:
            signal.signal(number, signal.SIG_IGN)  # it is over: what is left is to write down the result
        return _outcome(RunFolder(config.run_dir), code, brought_back=self.brought_back)


@dataclass(frozen=True)
class InProcess:
    """The run of config_file in the process that asks for the result, on the screen: for a debugger."""

    config_file: str

    def __call__(self) -> dict[str, Any] | None:
        """As Attempt. Raises: what the training raises, from where it does."""
        from qwenlora.trainer.main import main

        code = main([self.config_file], captured=False)
        return _outcome(RunFolder(load_config(self.config_file).run_dir), code, brought_back=False)


def summary(run: RunFolder) -> dict[str, Any]:
    """Return how a run stands: {"run_dir", "adapter", "reason", "step", "loss", "eval_loss", "attempts",
    "goodput"}.

    adapter: its folder, or None while there is none. reason: of the last attempt. loss, eval_loss: the last
    ones logged, missing before. goodput: the share of the time that went into steps, or None.
    """
    attempts = run.history.attempts()
    last = attempts[-1] if attempts else None
    losses = {key: line[key] for key in ("loss", "eval_loss") if (line := last_line(run.metrics, key))}
    return {
        "run_dir": str(run.path),
        "adapter": str(run.adapter) if run.adapter.is_dir() else None,
        "reason": last.reason if last else None,
        "step": run.history.last_step(),
        **losses,
        "attempts": len(attempts),
        "goodput": last.goodput if last else None,
    }


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_CODES["stopped"])


def _leave_without_traceback(code: int) -> None:
    """Have this process, if what comes next ends it, leave with code: the agent has said all there is to
    say."""

    def leave(*_: object) -> None:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)

    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        sys.excepthook = leave


def _outcome(run: RunFolder, code: int, *, brought_back: bool) -> dict[str, Any] | None:
    if code == EXIT_CODES["stopped"] and brought_back:
        raise SystemExit(code)  # no Exception: submitit writes no result, and the batch shell sees the code
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    if code in (EXIT_CODES["done"], EXIT_CODES["stopped"]):
        return summary(run) if first else None
    attempts = run.history.attempts()
    message = (attempts[-1].message if attempts else "") or f"the agent ended with exit code {code}"
    _leave_without_traceback(code)
    if code == EXIT_CODES["refused"]:
        raise ValueError(message)
    raise RuntimeError(f"{message}; logs: {run.logs(len(attempts))}")
