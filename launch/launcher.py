"""Runs the ranks of one node, forked from its forkserver or under DeepSpeed's launcher, and watches them to
their end."""

import os
import signal
import subprocess
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import IO

import psutil

from qwenlora.launch.children import environment_of, prepare_child
from qwenlora.launch.commands import RANK_MODULE, deepspeed_argv
from qwenlora.launch.deaths import Deaths
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run import heartbeat
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.lent_screen import lend
from qwenlora.run.signals import STOP_SIGNALS


def run_ranks(node: Node, watch: Watch, handover: Handover, port: int) -> int:
    """Run this node's ranks; return their exit code. port: of the first node, to meet at."""
    number = node.allocation.node
    watch.ranks_started = time.monotonic()  # the preparation may have taken long
    with heartbeat.make_folder() as watch.beats:
        memory = node.memory.paths if node.keeps_snapshots else ()
        handover = replace(handover, beats=watch.beats, memory=memory)
        run = _run_forked if node.forks_ranks else _run_deepspeed
        code = run(node, watch, handover, port, f"launch-{number}" if number else "launch")
        watch.after(code)
    return code


def _run_forked(node: Node, watch: Watch, handover: Handover, port: int, log: str) -> int:
    with lend(watch.beats) if node.has_taken_over else nullcontext("") as screen:
        common = _variables(handover, node.folder) | replace(handover, screen=screen).environment()
        ranks = [common | rank for rank in rank_variables(node, port)]
        watch.failures = forked = node.forkserver.train(handover.attempt, log, ranks)
        return node.children.run(forked, watch.while_training)


def rank_variables(node: Node, port: int) -> list[dict[str, str]]:
    """Return torchrun's variables for each rank of a node. port: of the first node."""
    allocation, count = node.allocation, node.processes
    common = {
        "MASTER_ADDR": allocation.hosts[0] if allocation.nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(count),
        "WORLD_SIZE": str(count * allocation.nodes),
        "GROUP_RANK": str(allocation.node),
    }
    first = allocation.node * count
    return [common | {"LOCAL_RANK": str(n), "RANK": str(first + n)} for n in range(count)]


def _run_deepspeed(node: Node, watch: Watch, handover: Handover, port: int, log: str) -> int:
    argv = deepspeed_argv([str(node.folder.config)], node.processes, node.allocation, port)
    with ExitStack() as stack:
        file = stack.enter_context(node.folder.log(handover.attempt, log).open("ab"))
        screen = stack.enter_context(lend(watch.beats) if node.allocation.first else nullcontext(""))
        deaths = stack.enter_context(Deaths(watch.beats, file, node.processes))
        watch.failures = deaths
        environment = environment_of(node.processes) | _variables(handover, node.folder)
        environment |= replace(handover, screen=screen).environment()
        code = node.children.run(_Launched(argv, environment, file), watch.while_training, deaths.pause)
        deaths.report_exit_code(code)
    return code


class _Launched:
    """DeepSpeed's launcher. It has signal handlers of its own, which kill ranks that are not done within half
    a minute. So the stop signals are blocked for it; its ranks inherit that, and unblock them once they can
    handle them (trainer/ranks). It prints much, which goes to the log."""

    def __init__(self, argv: list[str], environment: dict[str, str], log: IO[bytes]) -> None:
        def prepare() -> None:
            prepare_child()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

        self._process = subprocess.Popen(
            argv, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare
        )

    def poll(self) -> int | None:
        """Return the launcher's exit code."""
        return self._process.poll()

    def ranks(self) -> list[psutil.Process]:
        """Return its ranks."""
        return [process for process in self._descendants() if _runs(process, RANK_MODULE)]

    def kill(self) -> None:
        """Kill the launcher and its ranks."""
        for process in self._descendants():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.kill()

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _variables(handover: Handover, folder: RunFolder) -> dict[str, str]:
    """Return variables that have NCCL write its last collectives if one hangs, except those that the user has
    set.

    Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
    """
    prefix = folder.flight_recorder(handover.attempt)
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }
    return {name: value for name, value in recorder.items() if name not in os.environ}
