"""A job's goodput when a node fails every hour, on 2 to 1,024 nodes: simulated, failure by failure.

`python benchmarks/goodput.py [RUN ...]` takes the seconds of restarts from the attempts of these runs, or
else those below. It compares three ways to go on: the job is requeued (as with --no-kill=off); it goes on in
its allocation, from the last checkpoint; it goes on there from the last snapshot in memory.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from qwenlora.plan.scale import kept_share
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import inside_job
from qwenlora.run.records import Attempt
from qwenlora.run.snapshots import EVERY_S

INSIDE_S = 14.0  # measured: a node without power, from the loss to the end of the next new step (tests/slurm)
REQUEUED_S = (
    128.0  # Slurm's pause before a requeued job starts (120 s by default), and the start; an empty queue
)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Job:
    """A job, and how it goes on. Times in seconds. between: failures, on average; save: between checkpoints;
    keep: between snapshots in memory, None for none; inside: of a restart in the allocation, None where it is
    always requeued; requeued: of one through the queue."""

    nodes: int
    between: float
    save: float
    keep: float | None
    inside: float | None
    requeued: float


@dataclass
class Outcome:
    """What became of the time. useful: in steps that counted; at_work: the mean share of nodes in them."""

    useful: float
    at_work: float


def simulate(job: Job, hours: float, chance: random.Random) -> Outcome:
    """Return what a job does in so many hours. A node that fails is back only when the job is requeued, as it
    is when fewer than half of its nodes are left (launch.min_nodes)."""
    end, now, useful, weighted = 3600 * hours, 0.0, 0.0, 0.0
    left = job.nodes
    while now < end:
        worked = chance.expovariate(1 / job.between)
        now += worked
        left -= 1
        goes_on = job.inside is not None and 2 * left >= job.nodes
        # a snapshot outlives its node where another node has one, too
        every = job.keep if job.keep is not None and job.inside is not None and left else job.save
        kept = worked // every * every
        useful += kept
        weighted += kept * (left + 1) / job.nodes
        took = job.inside if goes_on and job.inside is not None else job.requeued
        if not goes_on:
            left = job.nodes
        now += took
    return Outcome(useful / now, weighted / useful)


def measured(runs: Sequence[Path]) -> tuple[float, float]:
    """Return the median seconds from a loss to the end of the next step: in a job, and through the queue."""
    inside, requeued = [], []
    for path in runs:
        attempts = RunFolder(path).history.attempts()
        inside += [seconds for _, seconds in inside_job(attempts) if seconds is not None]
        requeued += [seconds for last, one in pairwise(attempts) if (seconds := _through_queue(last, one))]
    return (
        statistics.median(inside) if inside else INSIDE_S,
        statistics.median(requeued) if requeued else REQUEUED_S,
    )


def _through_queue(last: Attempt, one: Attempt) -> float | None:
    if one.job_id is None or last.end is None or one.restart_s is None or one.restarts == last.restarts:
        return None
    return (one.start - last.end).total_seconds() + one.restart_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to take seconds from")
    parser.add_argument("--between-min", type=float, default=60, help="minutes between failures of the job")
    parser.add_argument("--save-min", type=float, default=10, help="minutes between checkpoints")
    parser.add_argument("--hours", type=float, default=5000, help="simulated for each line")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for run in chosen.runs:
        if not RunFolder(run).history.file.exists():
            parser.error(f"{run} has no attempts.jsonl; name run folders")
    inside, requeued = measured(chosen.runs)
    job = Job(2, 60 * chosen.between_min, 60 * chosen.save_min, EVERY_S, inside, requeued)
    print(f"a failure each {chosen.between_min:g} min, a checkpoint each {chosen.save_min:g} min;")
    print(f"a restart takes {inside:.1f} s inside the job, {requeued:.0f} s through the queue\n")
    print("| nodes | requeued | inside the job | and from memory | by formula | nodes at work |")
    print("|---|---|---|---|---|---|")
    for nodes in SIZES:
        chance = random.Random(chosen.seed)
        ways = [replace(job, nodes=nodes, **way) for way in ({"inside": None}, {"keep": None}, {})]
        before, without, whole = (simulate(way, chosen.hours, chance) for way in ways)
        formula = kept_share(EVERY_S, inside, 60 / chosen.between_min)
        shares = " | ".join(
            f"{share:.1%}" for share in (before.useful, without.useful, whole.useful, formula)
        )
        print(f"| {nodes:,} | {shares} | {whole.at_work:.0%} |")


if __name__ == "__main__":
    main()
