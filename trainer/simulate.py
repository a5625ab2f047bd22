"""`train --simulate-world`: the first and the last rank of a run whose other ranks are not there.

Both are the real program for a few steps: order of rows, packs, accumulation, base, adapter, optimizer,
save. torch's fake process group stands for the others and sends nothing. So losses and weights mean nothing;
memory, start-up and work are those of a rank among so many. All is written to a temporary folder.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from qwenlora.configs import Config
from qwenlora.configs.combinations import check_simulated
from qwenlora.configs.estimate import cut_into
from qwenlora.data import prepared
from qwenlora.data.order import Rows, total_steps
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import count
from qwenlora.run.handover import Handover
from qwenlora.run.heartbeat import Heart
from qwenlora.run.history import EXIT_CODES
from qwenlora.run.orphans import die_with_parent
from qwenlora.run.records import Record
from qwenlora.trainer import attempt
from qwenlora.trainer.loop.arguments import order_of
from qwenlora.trainer.model.base_files import peak_memory
from qwenlora.trainer.prepare import prepare
from qwenlora.trainer.process import Process
from qwenlora.trainer.ranks.rendezvous import pretend
from qwenlora.trainer.ranks.screen import Rank, take_screen
from qwenlora.trainer.ranks.stop_request import StopRequest
from qwenlora.trainer.spread.strategy import choose

STEPS = 3
AHEAD = 200  # steps of which all ranks' tokens are counted
ATTEMPT = 1


class Simulated(Record):
    """What a rank took. start_up_s: seconds to its first forward pass, without imports, and of them those of
    a CPU; resident, on_gpu: the most bytes of memory; micro_batch: rows, or packs, at once."""

    start_up_s: float
    start_up_cpu_s: float
    resident: int
    on_gpu: int
    steps: int
    micro_batch: int


class Shares(NamedTuple):
    """Tokens of ranks. of: {rank: in the simulated steps}; uneven: those of the slowest rank of each of the
    coming steps, relative to the mean of all ranks; whole: in those that have a whole global batch, 0 without
    any; steps: how many come."""

    of: dict[int, int]
    uneven: float
    whole: float
    steps: int


def simulate(config: Config, last: Rank, processes: int, console: Console) -> int:
    """Run the first and a last rank, and print what they took; return the exit code. last: the last;
    processes: of a node. Raises: ValueError when the config cannot start, or not be simulated."""
    with TemporaryDirectory(prefix="qwenlora-simulated-") as folder:
        run = RunFolder(Path(folder) / "run")
        config = _beside(config, run)
        with run.claim(config):
            run.begin_attempt(last.world_size)
            console.print("preparing model and data ...")
            found: list[Simulated] = []
            for rank in (None, 0, last.rank):
                name = "prepare" if rank is None else f"rank-{rank}"
                variables = {} if rank is None else _variables(rank, last.world_size, processes)
                code = _forked(config, run, name, variables)
                if code:
                    return _report_failure(run, name, code, console)
                found += [] if rank is None else [Simulated.read(run.path / f"{name}.json")]
        shares = _shares(config, run, last, found[0])
        _show(last, processes, found, shares, console)
    return EXIT_CODES["done"]


def _beside(config: Config, run: RunFolder) -> Config:
    """Return the config for a folder of its own, with the real run's prepared rows."""
    cache = str(RunFolder(config.run_dir).cache(config))
    changed = {
        "data": config.data.model_copy(update={"cache_dir": cache}),
        "log": config.log.model_copy(update={"to": []}),
        "launch": config.launch.model_copy(update={"preflight": "off"}),  # nobody would reduce right
    }
    return config.model_copy(update=changed | {"run_dir": str(run.path)})


def _variables(rank: int, world_size: int, processes: int) -> dict[str, str]:
    """Return torchrun's variables for a rank, which has this machine's first GPU."""
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": 0}
    variables = {name: str(number) for name, number in numbers.items()}
    return variables | {"GROUP_RANK": str(rank // processes), "MASTER_ADDR": "127.0.0.1"}


def _forked(config: Config, run: RunFolder, name: str, variables: dict[str, str]) -> int:
    """Run a process to its end; return its exit code. It is forked, so that nothing is imported again."""
    work = _train if variables else _prepare
    child = multiprocessing.get_context("fork").Process(
        target=_become, args=(config, run, name, variables, work)
    )
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _become(
    config: Config, run: RunFolder, name: str, variables: dict[str, str], work: Callable[[Process], int]
) -> None:
    die_with_parent()
    os.environ |= variables
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as where several ranks share a node
    console = take_screen(run.log(ATTEMPT, name), speaks=False)
    rank = Rank.of_environment() if variables else Rank(0, 1)
    handover = Handover(ATTEMPT, resume="none")  # not from what the rank before has saved
    process = Process(config, run, rank, StopRequest(), handover, True, name, ATTEMPT, console)
    sys.exit(process.exit_code_of(work))


def _prepare(process: Process) -> int:
    prepare(process.config, process.run)
    return EXIT_CODES["done"]


def _train(process: Process) -> int:
    watch = _Watch(process.request)
    pretend(process.rank)
    facts = process.run.read_facts()
    spread = choose(process.config, facts.parameters, facts.longest)
    check_simulated(process.config, spread.name)  # what auto is here
    outcome = attempt.train(process, watch)
    report = Simulated(
        start_up_s=watch.start_up_s,
        start_up_cpu_s=watch.start_up_cpu_s,
        resident=peak_memory(),
        on_gpu=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        steps=outcome.step,
        micro_batch=spread.micro_batch,
    )
    (process.run.path / f"{process.name}.json").write_text(report.text())
    return EXIT_CODES["done"]


class _Watch(Heart):
    """Notes when a rank computes for the first time, and asks it to stop after the last step."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__("", 0)
        self._request, self._begun = request, time.monotonic()
        self.start_up_s = self.start_up_cpu_s = 0.0

    def beat(self, step: int | None = None) -> None:
        """Note a sign of life. step: that is under way, 0 before any."""
        if step and not self.start_up_s:
            self.start_up_s, self.start_up_cpu_s = time.monotonic() - self._begun, time.process_time()
        if step == STEPS:
            self._request.ask("--simulate-world")


def _report_failure(run: RunFolder, name: str, code: int, console: Console) -> int:
    """Say why a process failed; return the exit code. Raises: ValueError for a refusal."""
    said = next((error.message for error in run.errors(ATTEMPT)), f"it ended with code {code}")
    if code == EXIT_CODES["refused"]:
        raise ValueError(said)
    console.print(f"failed: {name}: {said}", style="red", soft_wrap=True)
    return EXIT_CODES["failed"]


def _shares(config: Config, run: RunFolder, last: Rank, first: Simulated) -> Shares:
    """Count tokens by the order alone."""
    facts, train = run.read_facts(), config.train
    side, folder = prepared.open_side(Path(facts.data_folder), "train"), Path(facts.data_folder)
    assert side is not None, "they were trained"
    packs = prepared.open_packs(folder) if facts.packing else None
    order = order_of(cut_into(config, first.micro_batch), side, packs)
    coming = total_steps(facts.units, train.global_batch_size, train.num_train_epochs, train.max_steps)
    tokens = [order.tokens_of_ranks(step, last.world_size) for step in range(min(coming, AHEAD))]
    every, batch = order.steps_per_epoch, train.global_batch_size
    whole = [of for step, of in enumerate(tokens) if (step % every + 1) * batch <= order.units]
    return Shares(
        {rank: sum(int(step[rank]) for step in tokens[: first.steps]) for rank in (0, last.rank)},
        _uneven(tokens),
        _uneven(whole),
        len(tokens),
    )


def _uneven(tokens: list[Rows]) -> float:
    """Return the tokens of each step's slowest rank relative to the mean; 0 without steps."""
    return sum(int(step.max()) for step in tokens) / max(1.0, sum(float(step.mean()) for step in tokens))


def _show(last: Rank, processes: int, found: list[Simulated], shares: Shares, console: Console) -> None:
    names = [f"rank {rank:,}" for rank in shares.of]
    nodes = last.world_size // processes
    console.print(
        f"{' and '.join(names)} of {last.world_size:,} ({count(nodes, 'node')} x {processes}) ran"
        f" {count(found[0].steps, 'step')}, without the others",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *names):
        table.add_column(name, no_wrap=True, justify="right" if name else "left")
    table.add_row("start-up in s, after imports", *(f"{each.start_up_s:.2f}" for each in found))
    table.add_row("of it on a CPU", *(f"{each.start_up_cpu_s:.2f}" for each in found))
    table.add_row("most memory in MB, resident", *(f"{each.resident / 1e6:,.1f}" for each in found))
    if found[0].on_gpu:
        table.add_row("on the GPU", *(f"{each.on_gpu / 1e6:,.1f}" for each in found))
    table.add_row(f"tokens in {count(found[0].steps, 'step')}", *(f"{each:,}" for each in shares.of.values()))
    console.print(table)
    whole = f"; {shares.whole:.3f} in steps of a whole batch" if shares.whole else ""
    console.print(
        f"slowest / mean: {shares.uneven:.3f}, the tokens of a step's slowest rank by those of all"
        f" {last.world_size:,} on average, in the coming {count(shares.steps, 'step')}{whole}",
        soft_wrap=True,
    )
