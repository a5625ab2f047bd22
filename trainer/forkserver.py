"""A process that imports the libraries once, and forks from itself what the agent of its node starts: the
preparation, then the ranks. The imports take many seconds, a fork takes none.

The agent (launch/forkserver.py) starts it while it checks nodes and data, with a socket as standard input.
Each line from the agent is a Start (run/handover.py), each answer a line of JSON: {"failed": code} as soon as
a process has failed, {"ended": code} when all have ended. A forked process returns from `serve`, and goes on
as trainer/main.py.

A forked process cannot use CUDA if its parent has used it. So the imports must not; should one do so all the
same, the processes begin as new interpreters, and import again.
"""

import gc
import importlib
import json
import os
import runpy
import stat
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qwenlora.configs import load_config
from qwenlora.run.folder import PREPARE_ONLY
from qwenlora.run.handover import Start
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.rank_deaths import killed_line
from qwenlora.trainer.hidden import hidden
from qwenlora.trainer.model.files import check_files

MAIN = "qwenlora.trainer.main"
MODULES = (
    "qwenlora.trainer.prepare",
    "qwenlora.trainer.attempt",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
ASKS_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch.cuda.is_available() then leaves CUDA alone


def serve() -> list[str]:
    """Import the libraries, and fork what the agent asks for; in this process it never returns. In a process
    that was forked, return the arguments for trainer/main.py."""
    screen, me = os.dup(1), os.getpid()
    os.dup2(2, 1)  # what libraries print at import is for the log
    if not _is_refused(sys.argv[1]):
        _import_libraries()
    log = None
    with os.fdopen(os.dup(0), "r+b", buffering=0) as agent:
        for line in iter(agent.readline, b""):
            start, processes = Start.parse(line), dict[int, str]()
            if start.log != log:
                _continue_in(Path(start.log), first=log is None)
                log = start.log
            for variables in start.variables:
                if not (pid := os.fork()):
                    die_with_parent(me)
                    agent.close()
                    _become(start.arguments, variables, screen)
                    return start.arguments
                processes[pid] = _name(start.arguments, variables)
            _answer(agent, "ended", _exit_code_of(processes, agent))
    sys.exit(0)


def _is_refused(config: str) -> bool:
    """Whether the preparation will refuse the model's files: it then needs no libraries."""
    if not Path(config).is_file():  # a node may see what another has written later
        return False
    try:
        check_files(load_config(config))
    except ValueError:
        return True
    return False


def _import_libraries() -> None:
    before = os.environ.get(ASKS_NVML)
    os.environ[ASKS_NVML] = "1"
    with hidden():
        try:
            for name in MODULES:
                importlib.import_module(name)
        except Exception:  # a process that was forked fails in the same way, and can report it
            traceback.print_exc()
    if before is None:
        del os.environ[ASKS_NVML]
    else:
        os.environ[ASKS_NVML] = before
    gc.collect()
    gc.freeze()  # the collections of forked processes then leave the memory that they share as it is


def _continue_in(log: Path, *, first: bool) -> None:
    """Make a log the standard error, and begin the first with what was written while there was none."""
    with log.open("ab") as file:
        if first and stat.S_ISREG(os.fstat(2).st_mode):
            file.write(Path("/proc/self/fd/2").read_bytes())
            file.flush()
            os.ftruncate(2, 0)  # the agent copies what is there if this process dies
        os.dup2(file.fileno(), 2)


def _become(arguments: list[str], variables: dict[str, str], screen: int) -> None:
    """Make this process, which was just forked, what the launcher of a rank starts."""
    os.environ.update(variables)
    os.dup2(screen, 1)
    os.close(screen)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    with suppress(OSError):  # some sandboxes forbid it
        Path("/proc/self/comm").write_text(_name(arguments, variables))  # as ps and top show it
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():  # what torch itself asks before it refuses to use CUDA
        os.execv(sys.executable, [sys.executable, "-u", "-m", MAIN, *arguments])  # noqa: S606


def _name(arguments: list[str], variables: dict[str, str]) -> str:
    return "prepare" if PREPARE_ONLY in arguments else f"rank-{variables['RANK']}"


def _exit_code_of(processes: dict[int, str], agent: BinaryIO) -> int:
    """Wait for processes; return 0, or the exit code of the first that left with another. processes: names by
    pid."""
    done, stopped = EXIT_CODES["done"], EXIT_CODES["stopped"]
    first = done
    while processes:
        pid, status = os.wait()
        process, code = processes.pop(pid, ""), os.waitstatus_to_exitcode(status)
        if not process or code == done or first not in (done, stopped):  # without a name: a library's own
            continue
        first = code
        if code < 0:
            print(killed_line(process, -code), end="", file=sys.stderr, flush=True)
        if code != stopped:
            _answer(agent, "failed", code)
    return first


def _answer(agent: BinaryIO, what: str, code: int) -> None:
    agent.write(json.dumps({what: code}).encode() + b"\n")


if __name__ == "__main__":
    sys.argv[1:] = serve()
    runpy.run_module(MAIN, run_name="__main__", alter_sys=True)  # as `python -m` does
