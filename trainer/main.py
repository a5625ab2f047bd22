"""The entry point of every process that trains or prepares; it ends with the attempt's exit code.

`torchrun --nproc-per-node 2 -m qwenlora.trainer.main configs/tiny.yaml lora.r=32` starts it by hand. An agent
(launch/agent.py) makes the run folder first, and prepares the data once (`--prepare-only`) before it starts
the ranks. Libraries that print at import are imported after the screen is taken, so that the log has it.
"""

import os
import sys
from functools import partial

from qwenlora.configs import load_config
from qwenlora.data.freshness import is_current
from qwenlora.run.folder import PREPARE_ONLY, RunFolder
from qwenlora.run.handover import received
from qwenlora.run.heartbeat import Heart
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.signals import under_nohup
from qwenlora.trainer.model.files import check_files
from qwenlora.trainer.process import Process
from qwenlora.trainer.ranks.screen import Rank
from qwenlora.trainer.ranks.stop_request import StopRequest


def main(arguments: list[str], *, captured: bool = True) -> int:
    """Run this process: CONFIG [key=value ...] [--prepare-only]. Return its exit code. captured: false leaves
    the screen and exceptions as they are, for debuggers."""
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher calls it so
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    prepares = PREPARE_ONLY in arguments
    config_file, *overrides = (argument for argument in arguments if argument != PREPARE_ONLY)
    config = load_config(config_file, overrides)
    run, rank, handover = RunFolder(config.run_dir), Rank.of_environment(), received()
    request = StopRequest()
    if not prepares:
        # an agent has its launcher ignore SIGHUP in any case
        request.listen(nohup=handover.nohup if handover.by_agent else under_nohup())
    begin = partial(Process.begin, config, run, rank, request, handover, captured=captured, prepares=prepares)
    if handover.by_agent:
        die_with_parent()
        work = _prepare if prepares else _check_only if handover.only_check else _train
        return begin().exit_code_of(work)
    if not rank.first:
        from qwenlora.trainer.ranks.rendezvous import meet

        meet(config, rank)  # rank 0 comes when the run folder and the data are ready
        return begin().exit_code_of(_train)
    with run.claim(config, fresh=handover.resume == "none", allowed=handover.allowed):
        run.begin_attempt(rank.world_size)
        return begin().exit_code_of(_prepare if prepares else _prepare_and_train)


def _prepare(process: Process) -> int:
    check_files(process.config)
    from qwenlora.trainer.prepare import prepare

    with process.request.at_once():  # nothing is trained yet that could be saved
        prepare(process.config, process.run, process.console, process.handover.allowed)
    return EXIT_CODES["done"]


def _prepare_and_train(process: Process) -> int:
    import torch

    if not is_current(process.config, process.run, on_gpu=torch.cuda.is_available()):
        _prepare(process)
    return _train(process)


def _check_only(process: Process) -> int:
    from qwenlora.trainer.ranks.rendezvous import leave

    _join(process)
    leave()
    return EXIT_CODES["done"]


def _train(process: Process) -> int:
    heart = _join(process)
    from qwenlora.trainer.attempt import train
    from qwenlora.trainer.ranks.rendezvous import leave

    outcome = train(process, heart)
    if process.rank.first:
        process.run.end_attempt(outcome.reason, outcome.why)
        process.say(outcome.last_words(process.run, process.handover))
    leave()
    return EXIT_CODES[outcome.reason]


def _join(process: Process) -> Heart:
    """Meet the other ranks, and check with them that they compute right; return this rank's heart."""
    from qwenlora.trainer.model.loading import device
    from qwenlora.trainer.ranks import gpus, preflight
    from qwenlora.trainer.ranks.rendezvous import meet

    heart = Heart(process.handover.beats, process.rank.rank)
    heart.beat(0)
    gpus.check(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    meet(process.config, process.rank)
    if process.handover.only_check or preflight.is_wanted(process.config):
        preflight.check_and_show(device(), process.console)
    return heart


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as refusal:  # before there was a run folder to write to
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(EXIT_CODES["refused"])
