"""Runs torchrun, or DeepSpeed's launcher, for the ranks of one node, and watches them to their end."""

import os
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import IO

from qwenlora.launch.commands import deepspeed_argv, rendezvous_options, torchrun_argv
from qwenlora.launch.deaths import Deaths
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run import heartbeat
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover
from qwenlora.run.lent_screen import lend

SHORTEST_RENDEZVOUS_S = 60


def run_ranks(node: Node, watch: Watch, handover: Handover, port: int) -> int:
    """Run this node's ranks; return their launcher's exit code. port: to meet at; 0: torchrun finds one."""
    number, attempt = node.allocation.node, handover.attempt
    with ExitStack() as stack:
        watch.beats = stack.enter_context(heartbeat.make_folder())
        handover = replace(handover, beats=watch.beats)
        name = f"launch-{number}" if number else "launch"
        log = stack.enter_context(node.folder.log(attempt, name).open("ab"))
        run = _run_deepspeed if node.config.launch.launcher == "deepspeed" else _run_torchrun
        code = run(node, watch, handover, port, log)
        watch.after(code)
    return code


def _run_torchrun(node: Node, watch: Watch, handover: Handover, port: int, log: IO[bytes]) -> int:
    run_id = f"{node.meeting.run_id}.{handover.attempt}"
    timeout_s = max(SHORTEST_RENDEZVOUS_S, node.config.launch.join_timeout_s)
    rendezvous = rendezvous_options(node.allocation, run_id, port, timeout_s)
    argv = torchrun_argv([str(node.folder.config)], node.processes, rendezvous)
    return node.children.run(argv, _rank_environment(handover, node.folder), log, watch.while_training)


def _run_deepspeed(node: Node, watch: Watch, handover: Handover, port: int, log: IO[bytes]) -> int:
    argv = deepspeed_argv([str(node.folder.config)], node.processes, node.allocation, port)
    screen = lend(watch.beats) if node.allocation.first else nullcontext("")
    with Deaths(watch.beats, log, node.processes) as deaths, screen as path:
        watch.deaths = deaths
        environment = _rank_environment(replace(handover, screen=path), node.folder)
        if node.processes > 1:  # as torchrun does: otherwise each rank would take all cores
            environment.setdefault("OMP_NUM_THREADS", "1")
        code = node.children.run(
            argv, environment, log, watch.while_training, pause=deaths.pause, isolated=True
        )
        deaths.report_exit_code(code)
    return code


def process_environment(handover: Handover) -> dict[str, str]:
    """Return the environment of a process that trains or prepares."""
    # without PYTHONSAFEPATH, `python -m` takes a random.py of the working folder for Python's own
    return os.environ | handover.environment() | {"PYTHONSAFEPATH": "1"}


def _rank_environment(handover: Handover, folder: RunFolder) -> dict[str, str]:
    """Return process_environment, and have NCCL write its last collectives if one hangs; user settings win.

    Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
    """
    prefix = folder.flight_recorder(handover.attempt)
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }
    return recorder | process_environment(handover)
