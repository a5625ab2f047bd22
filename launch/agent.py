"""One run on this machine, from a config to an exit code: 0 done, 75 stopped and resumable, 2 refused, 1 failed.

`qwenlora train configs/tiny.yaml lora.r=32` runs it. The agent makes or reopens the run folder, has the data prepared
once, then runs torchrun on `qwenlora.trainer.main`. It imports no torch.
"""

import difflib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from qwenlora.configs import Config
from qwenlora.configs.load import FIELDS, SECTIONS, to_yaml
from qwenlora.data import sources
from qwenlora.data.current import is_current
from qwenlora.data.order import accumulation_steps, total_steps
from qwenlora.data.prepared import files_key
from qwenlora.data.survey import survey
from qwenlora.jobs import checkpoints
from qwenlora.jobs.handover import Handover
from qwenlora.jobs.history import EXIT_CODES, Reason
from qwenlora.jobs.run import PREPARE_ONLY, RunFolder
from qwenlora.launch.children import RANK_MODULE, Children
from qwenlora.launch.hardware import gpu_count

TAIL_LINES = 15
# in torchrun's report of a failure; an exit code below 0 is a signal
_FIRST_KILLED = re.compile(r"\(first observed failure\):.*?rank\s+: (\d+).*?exitcode\s+: -(\d+)", re.DOTALL)


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


def check_keys(allowed: Sequence[str]) -> None:
    """Refuse what --allow-config-change has no key for. Raises: ValueError."""
    for key in allowed:
        if key not in FIELDS and key not in SECTIONS:
            near = difflib.get_close_matches(key, [*FIELDS, *SECTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are: {', '.join(SECTIONS)}"
            raise ValueError(f"--allow-config-change {key}: no such key{hint}")


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


def run(config: Config, *, fresh: bool = False, resume: str = "auto", allowed: Sequence[str] = ()) -> int:
    """Run a config to its end on this machine; return the exit code.

    fresh: set an earlier run aside; resume: auto (the newest whole checkpoint), none (as fresh), a name or path of one;
    allowed: config keys or sections that may differ from the run's earlier attempts. Raises: ValueError when it cannot
    start.
    """
    check(config)
    check_keys(allowed)
    if fresh and resume not in ("auto", "none"):
        raise ValueError(f"--fresh starts anew, --resume {resume} goes on; leave one of them out")
    console, folder = Console(markup=False, highlight=False), RunFolder(config.run_dir)
    if (fresh or resume != "auto") and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        console.print("requeued by Slurm: going on from the newest checkpoint, without --fresh and --resume")
        fresh, resume = False, "auto"
    with folder.claim(config, fresh=fresh or resume == "none", allowed=allowed) as changed:
        if folder.done and resume == "auto" and not changed.length:
            _refuse_other_data(config, folder)
            console.print(
                f"{config.run_dir} is done ({folder.history.last_step()} steps): the adapter is in"
                f" {config.run_dir}/adapter; --fresh trains anew, more train.max_steps or num_train_epochs go on",
                soft_wrap=True,
            )
            return 0
        _check_resume(config, folder, resume, allowed)
        processes = processes_of(config)
        attempt = folder.begin_attempt(processes)
        start = time.monotonic()
        handover = Handover(attempt, "none" if fresh else resume, tuple(allowed))
        preparing = [sys.executable, "-m", RANK_MODULE, str(folder.config), PREPARE_ONLY]
        training = torchrun_argv([str(folder.config)], processes)
        with Children() as children, folder.log(attempt, "launch").open("ab") as log:
            code = 0
            if not is_current(config, folder, on_gpu=gpu_count() > 0):
                console.print("preparing model and data ...")
                code = children.run(preparing, _environment(handover), log)
            if not code and not children.asked:
                console.print(f"starting {_processes(processes)} ...")
                handover = replace(handover, prepare_s=time.monotonic() - start)
                code = children.run(training, _environment(handover), log)
        code = _verdict(folder, attempt, code, children, console)
        if code == EXIT_CODES["refused"]:
            folder.refused()
        return code


def _check_resume(config: Config, folder: RunFolder, resume: str, allowed: Sequence[str]) -> None:
    """Refuse what names, manifests and the config show to be impossible, before anything is started."""
    newest = next(iter(folder.checkpoints()), None)
    if resume not in ("auto", "none"):
        newest = checkpoints.named(folder, resume, config.model_dump(mode="json", by_alias=True), allowed)
    elif newest is None or checkpoints.flaw(newest, thorough=False):
        return
    trained, steps = checkpoints.read(newest)["step"], config.train.max_steps
    if steps and trained > steps:
        raise ValueError(
            f"train.max_steps={steps} is less than the {trained} steps that {newest.name} has trained; raise it, or"
            " name an earlier checkpoint: --resume"
        )


def _environment(handover: Handover) -> dict[str, str]:
    # without PYTHONSAFEPATH, `python -m` takes a random.py of the working folder for Python's own
    return os.environ | handover.environment() | {"PYTHONSAFEPATH": "1"}


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _refuse_other_data(config: Config, folder: RunFolder) -> None:
    now = files_key(sources.find(config.data), folder.cache(config))
    if json.loads(folder.facts.read_text(encoding="utf-8"))["files_key"] != now:
        raise ValueError(
            f"run_dir={config.run_dir} is done, but was trained on other data: the files changed since;"
            " choose another run_dir, or --fresh to set the old run aside"
        )


def _verdict(folder: RunFolder, attempt: int, code: int, children: Children, console: Console) -> int:
    """Note how the attempt ended, tell the user what they need to know, return the exit code."""
    attempts = folder.history.attempts()
    reason: Reason | None = attempts[-1].get("reason") if attempts else None  # none: the run folder is gone
    if reason is None:  # rank 0 did not live to say
        error = _first_error(folder, attempt)
        message = error["message"] if error else f"a process ended without a word (exit code {code})"
        if code == 0 and folder.adapter.exists():  # it could not be noted
            return EXIT_CODES["done"]
        if children.asked and not error:
            reason, message = "stopped", f"{children.why}: before anything was saved"
            newest = next((path.name for path in folder.checkpoints()), "")
            then = f"goes on from {newest}" if newest else "starts again"
            console.print(f"stopped before anything of this attempt was saved; the same command {then}")
        elif error and error["code"] == 2:
            reason = "refused"
            console.print(f"error: {message}", style="red", soft_wrap=True)
        else:
            reason = "failed"
            _explain(folder, attempt, message, error, console)
        folder.end_attempt(reason, message)
    elif reason == "stopped" and children.asked:
        folder.note_attempt(message=children.why)  # ranks are told to stop by SIGTERM, whoever asked
    return EXIT_CODES[reason]


def _first_error(folder: RunFolder, attempt: int) -> dict[str, Any] | None:
    """Return the error of the rank that failed first: the others mostly fail because it did.

    A rank that was killed could not say so; torchrun knows.
    """
    found = []
    for file in folder.logs(attempt).glob("*.error.json"):
        found.append(json.loads(file.read_text(encoding="utf-8")) | {"process": file.name.split(".")[0]})
    log = folder.log(attempt, "launch")
    report = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if killed := _FIRST_KILLED.search(report):
        rank, number = f"rank-{killed[1]}", int(killed[2])
        # one that has said why may be met by a signal while it leaves
        if number != signal.SIGTERM and rank not in {error["process"] for error in found}:
            message = f"{rank.replace('-', ' ')} was killed by {signal.Signals(number).name}, not by qwenlora"
            if number == signal.SIGKILL:
                message += ": by hand, by the scheduler, or for want of memory (dmesg says)"
            return {"message": message, "code": 1, "process": rank, "ours": False}
    return min(found, key=lambda error: error["time"], default=None)


def _explain(folder: RunFolder, attempt: int, message: str, error: dict[str, Any] | None, console: Console) -> None:
    log = folder.log(attempt, error["process"] if error else "launch")
    console.print(f"failed: {message}", style="red", soft_wrap=True)
    if not log.exists() or (error and error["ours"]):
        return
    console.print(f"the last lines of {log}:", soft_wrap=True)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]:
        console.print(f"  {line}", soft_wrap=True)
