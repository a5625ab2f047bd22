"""What a plan says of an attempt, kept at its start, and what its end teaches the next plan."""

import logging
import statistics

import torch

from qwenlora.configs import Config
from qwenlora.configs.estimate import cut_into
from qwenlora.plan import measured
from qwenlora.plan.hardware import Gpu, of_driver
from qwenlora.plan.measured import Measured, Ran, device_of
from qwenlora.plan.plan import way_with
from qwenlora.plan.rows import RowCounts
from qwenlora.plan.speed import NETWORK, Case, Links
from qwenlora.run.folder import RunFolder
from qwenlora.run.hardware import cpu_name, memory_mib
from qwenlora.run.records import Attempt, Facts, Planned
from qwenlora.trainer.record.metrics import Line, MetricsFile
from qwenlora.trainer.spread.strategy import Spread

log = logging.getLogger("qwenlora")
LINES = 4  # of metrics.jsonl that an attempt has at least to be learnt from; the first has the start in it
STEPS = 20  # likewise


def planned(config: Config, facts: Facts, spread: Spread) -> Planned | None:
    """Return what a plan says of this attempt, on rank 0. None where the device is not known."""
    file = measured.read()
    gpu, train = _device(file), facts.data["train"]
    if gpu is None or facts.parameters.work is None:
        return None
    rows = RowCounts(train.rows, train.tokens, train.trained_tokens, train.longest, train.packs, counted=True)
    config, links = cut_into(config, spread.micro_batch), Links(gpu.link, NETWORK)
    case = Case(config, facts.parameters, rows, spread.machine, gpu, links, file)
    way = way_with(case, spread.name, spread.shard_group, spread.recomputed)
    by, needed = case.correction(spread.name), way.memory
    assert needed, "the way is not refused"
    return Planned(
        device=gpu.name,
        kind=measured.kind_of_strategy(config, spread.name),
        step_s=way.step_s,
        tokens_s=way.tokens_s,
        memory=needed.total - needed.reserve if spread.machine.gpus else None,
        memory_by=by.memory,
        time_by=by.time,
    )


def _device(file: Measured) -> Gpu | None:
    on_gpu = torch.cuda.is_available()
    name, mib = cpu_name(), memory_mib()
    if on_gpu:
        name, mib = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory // 2**20
        if known := of_driver(name):
            return known
    return device_of(name, mib, file.devices[name]) if name in file.devices else None


def learn(run: RunFolder) -> None:
    """Have the run that has just ended correct the next plans. Nothing depends on it."""
    attempt = run.history.attempts()[-1]
    if ran := of_attempt(attempt, list(MetricsFile(run.metrics).since(attempt.first_step or 0))):
        try:
            measured.change(lambda file: file.with_run(ran))
        except OSError as error:
            log.warning("%s cannot be written: %s", measured.file(), error.strerror)


def of_attempt(attempt: Attempt, lines: list[Line]) -> Ran | None:
    """Return an attempt beside the formulas, without corrections of earlier runs; None if it was too short.
    lines: of metrics.jsonl."""
    plan, logged = attempt.planned, [line for line in lines if "tokens_per_s" in line]
    if plan is None or len(logged) < LINES or logged[-1]["step"] - (attempt.first_step or 0) < STEPS:
        return None
    speed = statistics.median(line["tokens_per_s"] for line in logged[1:])
    peak = max(line["peak_memory_gb"] for line in logged) * 1e9
    return Ran(
        device=plan.device,
        kind=plan.kind,
        time=plan.tokens_s * plan.time_by / speed,
        memory=peak / plan.memory * plan.memory_by if plan.memory else None,
    )
