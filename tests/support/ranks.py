"""Functions run by several real processes that are one gloo group, as a run's ranks are."""

import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np

TIMEOUT_S = 1000.0  # a hang, however busy the machine is
# imported once, by the process that ranks are forked from: each rank is as new as if it had imported them
# itself
PRELOAD = ["libraries"]


def run_ranks(
    function: Callable[..., Any], count: int, *arguments: Any, timeout: float = TIMEOUT_S
) -> list[Any]:
    """Return what function(*arguments) returns in each of count new processes, by rank.

    function: of a module that a new process can import (tests/support/), not of a test file. It finds torch's
    gloo group made, RANK, LOCAL_RANK and the like set, one thread, and seeds that are the same in all ranks.
    Raises: what the first rank to fail raised, with a note of its number; TimeoutError naming the ranks that
    hang.
    """
    fresh, deadline = _forkserver(), time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(count):
            receiver, sender = fresh.Pipe(duplex=False)
            rank_arguments = (sender, dict(os.environ), function, rank, count, folder, arguments)
            process = fresh.Process(target=_rank, args=rank_arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results: dict[int, Any] = {}
            while len(results) < count:
                waiting = {pipes[rank]: rank for rank in range(count) if rank not in results}
                ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
                if not ready:
                    raise TimeoutError(
                        f"ranks {sorted(waiting.values())} of {count} did not end in {timeout:g} s"
                    )
                answers = [(waiting[pipe], *_received(pipe, processes[waiting[pipe]])) for pipe in ready]
                # ranks that lose a neighbour fail, too, but later
                failures = sorted(
                    (when, rank, error) for rank, when, _, error in answers if error is not None
                )
                if failures:
                    _, rank, (error, note) = failures[0]
                    error.add_note(f"in rank {rank} of {count}\n{note}")
                    raise error
                results |= {rank: result for rank, _, result, _ in answers}
        finally:
            for process in processes:
                if len(results) == count:
                    process.join(10)
                process.kill()
                process.join()
    return [results[rank] for rank in range(count)]


def _forkserver() -> Any:
    """Return what forks processes from one that has imported the libraries."""
    context, before = get_context("forkserver"), os.environ.get("PYTHONPATH", "")
    context.set_forkserver_preload(PRELOAD)
    # Python 3.11 does not tell it where this process finds modules, and it passes over what it does not find
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before
        if not before:
            del os.environ["PYTHONPATH"]
    return context


def _received(pipe: Any, process: Any) -> tuple[float, Any, Any]:
    """Return when a rank ended, its result, and its exception with the traceback as text, or None."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(10)
        return time.time(), None, (RuntimeError(f"it ended with exit code {process.exitcode}"), "")


def _rank(
    sender: Any,
    environment: dict[str, str],
    function: Any,
    rank: int,
    count: int,
    folder: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # it is the environment in which the first rank was started
    os.environ |= environment
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    result, failure = None, None
    try:
        assert "libraries" in sys.modules, "else each rank imports them, which takes longer than most tests"
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        # a file, not a port that another test could take
        dist.init_process_group("gloo", f"file://{Path(folder) / 'store'}", rank=rank, world_size=count)
        result = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        failure = (error, traceback.format_exc())
    ended = time.time()
    try:
        answer = pickle.dumps((ended, result, failure))
        pickle.loads(answer)  # some exceptions can be pickled, but not unpickled
    except Exception as error:
        note = failure[1] if failure else traceback.format_exc()
        text = (
            f"{type(failure[0]).__name__}: {failure[0]}" if failure else f"its result cannot be sent: {error}"
        )
        answer = pickle.dumps((ended, None, (RuntimeError(text), note)))
    sender.send_bytes(answer)
    sender.close()
    if failure:
        os._exit(1)  # gloo's threads may hang at exit when a neighbour has ended
