"""What `qwenlora watch` shows of a run: its overview, its job, and the newest numbers."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlora.data.order import total_steps
from qwenlora.jobs import find
from qwenlora.jobs.views.overview import RunOverview, read_overview
from qwenlora.run.folder import RunFolder
from qwenlora.run.history import goodput
from qwenlora.run.metrics_file import last_lines
from qwenlora.run.records import Progress
from qwenlora.run.state import RunState, last_accepted
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo

_BARS = "▁▂▃▄▅▆▇█"
_REQUEUED_WITHIN_S = 3600.0
_OVER = ("done", "stopped", "failed", "killed", "refused")


@dataclass(frozen=True)
class Watched:
    """A run as it is now. progress: of the last attempt; lines: the newest of metrics.jsonl with a loss."""

    overview: RunOverview
    job: JobInfo | None
    state: RunState
    progress: Progress | None
    lines: list[dict[str, float]]

    @property
    def run(self) -> RunFolder:
        """Its folder."""
        return self.overview.run

    @property
    def rests(self) -> bool:
        """Whether it is over, and Slurm will not start it again by itself: not an hour later."""
        old = time.time() - self.overview.last_sign > _REQUEUED_WITHIN_S
        return self.state == "done" or (self.state in _OVER and (self.job is None or old))

    @property
    def steps(self) -> int | None:
        """How many steps the run will have; None before its rows are counted."""
        config, facts = self.overview.config, self.overview.facts
        train = config.train if config else None
        if train is None or (facts is None and train.max_steps is None):
            return None
        units = facts.units if facts else 1
        return total_steps(units, train.global_batch_size, train.num_train_epochs, train.max_steps)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, at the pace of this attempt; None unless it trains."""
        attempt, now = self.overview.attempts[-1:], self.progress
        if self.state != "running" or not (attempt and now and self.steps):
            return None
        trained = now.step - (attempt[0].first_step or 1) + 1
        return now.trained_s / trained * (self.steps - now.step) if trained > 0 else None

    def newest(self, name: str) -> float | None:
        """Return a number of the newest line; None where it has none."""
        return self.lines[-1].get(name) if self.lines else None

    @property
    def losses(self) -> list[float]:
        """The newest losses, oldest first."""
        return [line["loss"] for line in self.lines]

    @property
    def goodput(self) -> float | None:
        """The share of its time that went into steps that count."""
        return goodput(self.run.history.so_far()) if self.overview.attempts else None

    @property
    def causes(self) -> str:
        """What Slurm ended attempts for: NODE_FAIL, 2 PREEMPTED."""
        causes = Counter(attempt.cause for attempt in self.overview.attempts if attempt.cause)
        return ", ".join(f"{count} {cause}" if count > 1 else cause for cause, count in causes.items())

    @property
    def waits_for(self) -> str:
        """Why its job waits in the queue, in Slurm's word; empty when it does not."""
        return self.job.reason if self.job and self.job.state == "PENDING" else ""


def read_watched(run: RunFolder) -> Watched:
    """Return what is known of a run now, after asking Slurm if that can matter."""
    overview = read_overview(run)
    attempts, job = overview.attempts, None
    last = last_accepted(attempts)
    if not (last and last.reason == "done"):  # asking takes 20 s a run where Slurm hangs
        job_id = find.newest_job(run, attempts)
        job = query.ask(job_id) if job_id else None
    progress = run.history.progress.read(last.attempt) if last else None
    return Watched(overview, job, find.state(run, attempts, job), progress, last_lines(run.metrics, "loss"))


class Watching:
    """Reads runs again and again; one that is over only when its files have changed."""

    def __init__(self) -> None:
        self._known: dict[RunFolder, tuple[list[float], Watched]] = {}

    def read(self, runs: Sequence[RunFolder]) -> list[Watched]:
        """Return the runs: first those under way, then the newest."""
        before = {str(run.path): known for run, known in self._known.items()}
        self._known = {}
        for run in runs:
            files = (run.history.file, run.metrics, run.config, run.submitted / "jobs.jsonl")
            changed = [file.stat().st_mtime if file.exists() else 0.0 for file in files]
            known = before.get(str(run.path))
            if known is None or known[0] != changed or not known[1].rests:
                known = changed, read_watched(run)
            self._known[run] = known
        found = [watched for _, watched in self._known.values()]
        return sorted(found, key=lambda each: (each.state in _OVER, -each.overview.last_sign))


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a line of bars, at most so many; those that are not finite are left out."""
    finite = [value for value in values if abs(value) < float("inf")]
    size = max(len(finite) / width, 1)
    starts = [round(at * size) for at in range(min(width, len(finite)))]
    parts = [finite[start : max(round(start + size), start + 1)] for start in starts]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)
