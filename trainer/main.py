"""What every rank starts with: the run folder, the screen, the others; then the attempt, and its exit code.

`torchrun --nproc-per-node 2 -m qwenlora.trainer.main configs/tiny.yaml lora.r=32`, or by the agent, which has
then made the run folder and had the data prepared (`--prepare-only`). The libraries that talk while they are
imported are
imported when the screen is taken: what they say goes to the log.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from rich.console import Console

from qwenlora.configs import Config, load_config
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import PREPARE_ONLY, RunFolder
from qwenlora.run.handover import Handover, received
from qwenlora.run.heartbeat import STACKS_SIGNAL, Heart
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.records import RankError
from qwenlora.trainer.ranks.screen import Rank, StoppedEarly, StopRequest, take_screen

log = logging.getLogger("qwenlora")
LONGEST_PREPARATION = timedelta(days=7)
LAST_WORDS_S = 2.0
_SHORTEST_WAIT_S = 60  # ranks of a node start together, but import for long on a slow disk


def main(arguments: list[str], *, captured: bool = True) -> int:
    """Run this process: CONFIG [key=value ...] [--prepare-only]. Return its exit code.

    captured: false leaves the screen and exceptions as they are, for debuggers.
    """
    with ExitStack() as held:
        return _main(arguments, held, captured)


def _main(arguments: list[str], held: ExitStack, captured: bool) -> int:
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher calls it so
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    prepare_only = PREPARE_ONLY in arguments
    config_file, *overrides = (argument for argument in arguments if argument != PREPARE_ONLY)
    config = load_config(config_file, overrides)
    run = RunFolder(config.run_dir)
    rank = Rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    request = StopRequest()
    if not prepare_only:
        request.listen()
    handover = received()
    if handover.by_agent:
        die_with_parent()
    elif rank.first:
        held.enter_context(run.claim(config, fresh=handover.resume == "none", allowed=handover.allowed))
        run.begin_attempt(rank.world_size)
    else:
        _meet(config, rank)  # the first rank comes when the folder and the data are ready
    attempt = handover.attempt if handover.by_agent else len(run.history.attempts())
    name = "prepare" if prepare_only else f"rank-{rank.rank}"
    if captured:
        console = take_screen(run.log(attempt, name), speaks=rank.first, lent=handover.screen)
    else:
        console = Console(quiet=not rank.first, markup=False, highlight=False)
    faulthandler.register(STACKS_SIGNAL, chain=False)  # into the log

    def fail(message: str, code: int, *, ours: bool = True) -> None:
        error = RankError(process=name, time=time.time(), message=message, code=code, ours=ours)
        try:
            write_atomically(run.error(attempt, name), error.text())
        except OSError as full:  # the disk is full, or the folder gone
            console.print(
                f"error: {message} (and {run.logs(attempt)} cannot be written: {full.strerror})", style="red"
            )
        if not handover.by_agent:  # else the agent, which sees all ranks, says which one failed first
            if rank.first:
                run.end_attempt("refused" if code == 2 else "failed", message)
                if code == 2:
                    run.put_back()
            console.print(f"error: {message}", style="red", soft_wrap=True)

    def give_up(message: str) -> None:
        """End this process, which hangs in a file operation: what it still writes may hang as well."""
        last_words = threading.Thread(target=fail, args=(message, 1), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        if last_words.is_alive():
            console.print(f"error: {message}", style="red", soft_wrap=True)
        os._exit(1)

    try:
        if prepare_only or (rank.first and not handover.by_agent and not _is_prepared(config, run)):
            from qwenlora.trainer.prepare import prepare

            with request.at_once():  # nothing is trained yet that could be saved
                prepare(config, run, console, handover.allowed)
        return 0 if prepare_only else _train(config, run, rank, request, console, handover, give_up)
    except StoppedEarly as stopped:
        run.end_attempt("stopped", str(stopped))
        console.print(
            "stopped while preparing: nothing is lost, the same command starts again", soft_wrap=True
        )
        return EXIT_CODES["stopped"]
    except Exception as error:
        if not captured:
            raise
        ours = type(error).__module__.startswith("qwenlora.")  # then its text says all
        log.error("%s failed", name, exc_info=None if ours else error)
        code = 2 if isinstance(error, ValueError) else 1
        fail(_message(error, ours=ours), code, ours=ours)
        return code


def _is_prepared(config: Config, run: RunFolder) -> bool:
    import torch

    from qwenlora.data.freshness import is_current

    return is_current(config, run, on_gpu=torch.cuda.is_available())


def _train(
    config: Config,
    run: RunFolder,
    rank: Rank,
    request: StopRequest,
    console: Console,
    handover: Handover,
    give_up: Callable[[str], None],
) -> int:
    heart = Heart(handover.beats, rank.rank)
    heart.beat(0)
    _meet(config, rank)
    _check(config, console, only=handover.only_check)
    if handover.only_check:
        _leave()
        return EXIT_CODES["done"]
    from qwenlora.trainer.attempt import train

    outcome = train(config, run, rank, request, console, handover, give_up, heart)
    if rank.first:
        run.end_attempt(outcome.reason, outcome.why)
        console.print(outcome.last_words(run, handover), soft_wrap=True)
    _leave()
    return EXIT_CODES[outcome.reason]


def _meet(config: Config, rank: Rank) -> None:
    """Wait for all ranks, once. The first one may be preparing data for hours: only then is there a process
    group."""
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
    _wait_for_all(store, rank, config.launch.join_timeout_s)
    timeout = timedelta(seconds=config.launch.ddp_timeout_s)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
    dist.barrier()


def _wait_for_all(store: Any, rank: Rank, timeout_s: int) -> None:
    """Say that this rank is here; the first one waits for all. Raises: TrainingFault naming those that do not
    come."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    keys = [f"qwenlora/here/{attempt}/{number}" for number in range(rank.world_size)]
    store.set(keys[rank.rank], socket.gethostname())
    if not rank.first:
        return
    end = time.monotonic() + max(timeout_s, _SHORTEST_WAIT_S)
    while missing := [number for number, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > end:
            from qwenlora.trainer.ranks.faults import TrainingFault

            names = ", ".join(map(str, missing))
            raise TrainingFault(
                f"rank{'s' * (len(missing) > 1)} {names} did not come; their logs may say why"
            )
        time.sleep(0.1)


def _check(config: Config, console: Console, *, only: bool) -> None:
    """Reduce and multiply with all ranks, where the config wants it and there is something to learn."""
    import torch

    from qwenlora.trainer.model import base as models
    from qwenlora.trainer.ranks import preflight

    several_nodes = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if not only and (config.launch.preflight != "full" or not (several_nodes or torch.cuda.is_available())):
        return
    line, slow = preflight.summary(preflight.check(models.device()))
    console.print(line, soft_wrap=True)
    if slow and torch.cuda.is_available():  # processes that share cores differ anyway
        console.print(f"warning: {slow}", style="yellow", soft_wrap=True)


def _leave() -> None:
    """Leave together: torchrun and DeepSpeed's launcher end all ranks when one leaves with 75."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _message(error: BaseException, *, ours: bool) -> str:
    """Return what we say ourselves as it is, an error of a library with its kind, on one line."""
    if isinstance(error, ValueError) or ours:
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as refusal:  # before there was a run folder to write to
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
