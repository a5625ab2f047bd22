"""What every rank starts with: the run folder, the screen, the others; then the attempt, and its exit code.

`torchrun --nproc-per-node 2 -m qwenlora.trainer.main configs/tiny.yaml lora.r=32`, or by the agent, which has then
made the run folder and had the data prepared (`--prepare-only`). The libraries that talk while they are imported are
imported when the screen is taken: what they say goes to the log.
"""

import json
import logging
import os
import socket
import sys
import time
from contextlib import ExitStack
from datetime import timedelta

from rich.console import Console

from qwenlora.configs import Config, load_config
from qwenlora.jobs.disk import write_atomically
from qwenlora.jobs.orphans import die_with_parent
from qwenlora.jobs.run import EXIT_CODES, PREPARE_ONLY, Reason, RunFolder
from qwenlora.trainer.screen import Rank, StopRequest, take_screen

log = logging.getLogger("qwenlora")
LONGEST_PREPARATION = timedelta(days=7)


def main(arguments: list[str]) -> int:
    """Run this process: CONFIG [key=value ...] [--prepare-only]. Return its exit code."""
    with ExitStack() as held:
        return _main(arguments, held)


def _main(arguments: list[str], held: ExitStack) -> int:
    prepare_only = PREPARE_ONLY in arguments
    config_file, *overrides = (argument for argument in arguments if argument != PREPARE_ONLY)
    config = load_config(config_file, overrides)
    run = RunFolder(config.run_dir)
    rank = Rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    request = StopRequest()
    if not prepare_only:
        request.listen()
    by_agent = "QWENLORA_ATTEMPT" in os.environ
    if by_agent:
        die_with_parent()
    elif rank.first:
        held.enter_context(run.claim(config))
        run.begin_attempt(rank.world_size)
    else:
        _meet(config, rank)  # the first rank comes when the folder and the data are ready
    attempt = int(os.environ.get("QWENLORA_ATTEMPT", len(run.history())))
    name = "prepare" if prepare_only else f"rank-{rank.rank}"
    console = take_screen(run.log(attempt, name), speaks=rank.first)
    try:
        if rank.first and (prepare_only or not by_agent):
            from qwenlora.trainer.prepare import prepare

            prepare(config, run, console)
        return 0 if prepare_only else _train(config, run, rank, request, console)
    except Exception as error:
        log.exception("%s failed", name)
        code = 2 if isinstance(error, ValueError) else 1
        message = _message(error)
        record = json.dumps({"time": time.time(), "message": message, "code": code}, ensure_ascii=False)
        write_atomically(run.error(attempt, name), record)
        if not by_agent:  # else the agent, which sees all ranks, says which one failed first
            if rank.first:
                run.end_attempt("refused" if code == 2 else "failed", message)
            console.print(f"error: {message}", style="red", soft_wrap=True)
        return code


def _train(config: Config, run: RunFolder, rank: Rank, request: StopRequest, console: Console) -> int:
    _meet(config, rank)
    from qwenlora.trainer.attempt import train

    reason, steps = train(config, run, rank, request, console, os.environ.get("QWENLORA_RESUME", "auto"))
    if rank.first:
        run.end_attempt(reason, steps=steps)
    console.print(_last_words(reason, steps, run), soft_wrap=True)
    _leave()
    return EXIT_CODES[reason]


def _meet(config: Config, rank: Rank) -> None:
    """Wait for all ranks, once. The first one may be preparing data for hours: only then is there a process group."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if rank.world_size == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(rendezvous("env://", rank.rank, rank.world_size, timeout=LONGEST_PREPARATION))
    ready = f"qwenlora/ready/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank.first:
        store.set(ready, "1")
    else:
        if os.environ.get("LOCAL_RANK") == "0" and not store.check([ready]):  # one line a node
            print(f"{socket.gethostname()}: waiting for rank 0, which prepares model and data", flush=True)
        store.wait([ready], LONGEST_PREPARATION)
    timeout = timedelta(seconds=config.launch.ddp_timeout_s)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
    dist.barrier()


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _last_words(reason: Reason, steps: dict[str, int], run: RunFolder) -> str:
    if reason == "stopped":
        return f"stopped after step {steps['last_step']}, which is saved; the same command resumes"
    return f"done: the adapter is in {os.path.relpath(run.adapter)}"


def _message(error: BaseException) -> str:
    """Return a user's error as it is, one of ours or a library's with its kind, on one line."""
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as refusal:  # before there was a run folder to write to
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
