"""One run on this machine, from a config to an exit code: 0 done, 75 stopped and resumable, 2 refused, 1 failed.

`qwenlora train configs/tiny.yaml lora.r=32` runs it. The agent makes or reopens the run folder, has the data prepared
once, then runs torchrun on `qwenlora.trainer.main`. It imports no torch.
"""

import json
import os
import shlex
import sys
from typing import Any

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.configs.load import to_yaml
from qwenlora.data import sources
from qwenlora.data.order import accumulation_steps, total_steps
from qwenlora.data.prepared import files_key
from qwenlora.data.survey import survey
from qwenlora.jobs.run import EXIT_CODES, PREPARE_ONLY, RunFolder
from qwenlora.launch.children import RANK_MODULE, Children
from qwenlora.launch.hardware import gpu_count

TAIL_LINES = 15


def processes_of(config: Config) -> int:
    """Return how many ranks this node runs."""
    return config.launch.nproc_per_node or gpu_count() or 1


def torchrun_argv(arguments: list[str], processes: int) -> list[str]:
    """Return the command that starts the ranks. --standalone: a free port on this machine.

    arguments: a config file and overrides.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--signals-to-handle=SIGQUIT",  # children.py brings the others to the ranks
        "-m",
        RANK_MODULE,
        *arguments,
    ]


def check(config: Config) -> int:
    """Return the accumulation steps. Raises: ValueError for what can be refused before anything is started."""
    sources.find(config.data)
    return accumulation_steps(
        config.train.global_batch_size, config.train.per_device_train_batch_size, processes_of(config)
    )


def dry_run(config: Config, arguments: list[str]) -> str:
    """Return the resolved config, what follows from it, and the command that does it by hand. Reads the data files.

    arguments: the config file and overrides that config was loaded from.
    """
    accumulation = check(config)
    train, data, processes = config.train, config.data, processes_of(config)
    rows = survey(data)
    packs = data.packing == "on" or (data.packing == "auto" and gpu_count() > 0)
    if packs or data.overlength == "split":
        steps = f"known when the rows are {'packed' if packs else 'split'}: qwenlora data check {shlex.join(arguments)}"
    else:
        total = total_steps(rows.train, train.global_batch_size, train.num_train_epochs, train.max_steps)
        steps = f"{total}, {-(-rows.train // train.global_batch_size)} an epoch"
    command = shlex.join(torchrun_argv(arguments, processes))
    dropped = " (before long ones are dropped)" * (data.overlength == "drop")
    bad = f", {rows.bad:,} more cannot be trained and are left out" * (rows.bad > 0)
    return (
        f"{to_yaml(config)}\n"
        f"# rows                {rows.train:,}{dropped}{bad}\n"
        f"# processes           {processes}\n"
        f"# global batch        {train.global_batch_size} {'packs' if packs else 'rows'} = {_processes(processes)} x"
        f" {train.per_device_train_batch_size} x {accumulation} accumulated\n"
        f"# steps               {steps}\n"
        f"# run folder          {RunFolder(config.run_dir).path}\n"
        f"# command             {command}\n" + "".join(f"# warning             {note}\n" for note in rows.notes)
    )


def run(config: Config, *, fresh: bool = False, resume: str = "auto") -> int:
    """Run a config to its end on this machine; return the exit code. Raises: ValueError when it cannot start."""
    check(config)
    console, folder = Console(markup=False, highlight=False), RunFolder(config.run_dir)
    with folder.claim(config, fresh=fresh):
        if folder.done and resume == "auto":
            _refuse_other_data(config, folder)
            last = max(attempt.get("last_step", 0) for attempt in folder.history())
            console.print(
                f"{config.run_dir} is done ({last} steps): the adapter is in {config.run_dir}/adapter;"
                " --fresh trains anew",
                soft_wrap=True,
            )
            return 0
        processes = processes_of(config)
        attempt = folder.begin_attempt(processes)
        environment = os.environ | {
            "QWENLORA_ATTEMPT": str(attempt),
            "QWENLORA_RESUME": resume,
            "PYTHONSAFEPATH": "1",  # else `python -m` takes a random.py of the working folder for Python's own
        }
        steps = {
            "preparing model and data": [sys.executable, "-m", RANK_MODULE, str(folder.config), PREPARE_ONLY],
            f"starting {_processes(processes)}": torchrun_argv([str(folder.config)], processes),
        }
        code = 0
        with Children() as children:
            for what, argv in steps.items():
                console.print(f"{what} ...")
                with folder.log(attempt, "launch").open("ab") as log:
                    code = children.run(argv, environment, log)
                if code or children.asked:
                    break
        return _verdict(folder, attempt, code, children.asked, console)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _refuse_other_data(config: Config, folder: RunFolder) -> None:
    now = files_key(sources.find(config.data), folder.cache(config))
    if json.loads(folder.facts.read_text(encoding="utf-8"))["files_key"] != now:
        raise ValueError(
            f"run_dir={config.run_dir} is done, but was trained on other data: the files changed since;"
            " choose another run_dir, or --fresh to set the old run aside"
        )


def _verdict(folder: RunFolder, attempt: int, code: int, asked: bool, console: Console) -> int:
    """Note how the attempt ended, tell the user what they need to know, return the exit code."""
    if "reason" not in folder.history()[-1]:  # rank 0 did not live to say
        error = _first_error(folder, attempt)
        if asked:
            folder.end_attempt("stopped", "before anything of this attempt was saved")
            console.print("stopped before anything was saved; the same command starts from there")
        elif error and error["code"] == 2:
            folder.end_attempt("refused", error["message"])
            console.print(f"error: {error['message']}", style="red", soft_wrap=True)
        else:
            message = error["message"] if error else f"a process ended without a word (exit code {code})"
            folder.end_attempt("failed", message)
            _explain(folder, attempt, message, error, console)
    return EXIT_CODES[folder.history()[-1]["reason"]]


def _first_error(folder: RunFolder, attempt: int) -> dict[str, Any] | None:
    """Return the error of the rank that failed first: the others mostly fail because it did."""
    found = []
    for file in folder.logs(attempt).glob("*.error.json"):
        found.append(json.loads(file.read_text(encoding="utf-8")) | {"process": file.name.split(".")[0]})
    return min(found, key=lambda error: error["time"], default=None)


def _explain(folder: RunFolder, attempt: int, message: str, error: dict[str, Any] | None, console: Console) -> None:
    log = folder.log(attempt, error["process"] if error else "launch")
    console.print(f"failed: {message}", style="red", soft_wrap=True)
    console.print(f"the last lines of {log}:", soft_wrap=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]:
        console.print(f"  {line}", soft_wrap=True)
