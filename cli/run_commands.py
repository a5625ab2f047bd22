"""The commands that show runs, or stop them: status, logs, cancel, runs, diff."""

from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import Run, RunOrJobName, run_argument, screen
from qwenlora.jobs import cancel as cancelling
from qwenlora.jobs.find import find
from qwenlora.jobs.views.diff import show_diff
from qwenlora.jobs.views.logs import show_logs
from qwenlora.jobs.views.runs import show_runs
from qwenlora.jobs.views.status import show_status


def status(
    run: Annotated[str, run_argument("RUN|JOB|SWEEP", "A run folder, a sweep's, or a job's id.")],
) -> int:
    """Show a run's attempts, how far it is, its job and its checkpoints; of a sweep, a line a run.

    Example: qwenlora status runs/my
    """
    show_status(find(run), screen())
    return 0


def logs(
    run: RunOrJobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="The log of one process, of the last attempt.")
    ] = None,
) -> int:
    """Show the output of a run's job, or the log of one of its processes.

    Example: qwenlora logs --follow runs/my
    """
    try:
        show_logs(find(run), rank=rank, follow=follow)
    except KeyboardInterrupt:
        return 130
    return 0


def cancel(
    run: RunOrJobName,
    now: Annotated[bool, typer.Option("--now", help="Stop at once, without saving.")] = False,
) -> int:
    """Stop a run for good: it saves, and does not come back by itself.

    Example: qwenlora cancel runs/my
    """
    print("\n".join(cancelling.cancel(find(run), now=now)))
    return 0


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look for run folders.")] = Path(
        "runs"
    ),
) -> int:
    """List runs: how far each is, its evaluation, its data, its key settings, its adapter.

    Example: qwenlora runs runs
    """
    return show_runs(folder, screen())


def diff(first: Run, second: Annotated[Path, run_argument("RUN", "Another one.")]) -> int:
    """Show in what two runs differ: config, code, data, results.

    Example: qwenlora diff runs/first runs/second
    """
    return show_diff(first, second, screen())
