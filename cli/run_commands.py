"""The commands that show runs and their nodes, or stop them: status, logs, cancel, runs, diff, nodes."""

from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import Run, RunOrJobName, run_argument, screen
from qwenlora.jobs import cancel as cancelling
from qwenlora.jobs.find import find
from qwenlora.jobs.views import nodes as bad_nodes
from qwenlora.jobs.views.diff import show_diff
from qwenlora.jobs.views.logs import show_logs
from qwenlora.jobs.views.runs import show_runs
from qwenlora.jobs.views.status import show_status
from qwenlora.run.bad_nodes import BadNodes


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


def nodes(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the runs.")] = Path("runs"),
    add: Annotated[str | None, typer.Option(metavar="NODES", help="Have jobs leave out node[1-4,7].")] = None,
    why: Annotated[str, typer.Option(help="With --add: the reason.")] = "added by hand",
    clear: Annotated[str | None, typer.Option(metavar="NODES", help="Have jobs use them again.")] = None,
    sbatch: Annotated[
        int | None,
        typer.Option(metavar="NODES", min=1, help="Print sbatch's --exclude, for a job of so many nodes."),
    ] = None,
) -> int:
    """Show the nodes that runs found bad, which their jobs leave out; add or clear some.

    Example: qwenlora nodes --clear node7
    """
    entries = BadNodes(folder)
    if sbatch and (add or clear):
        raise ValueError(f"--sbatch {sbatch}: expected without --add and --clear; run those first")
    if sbatch:
        print(bad_nodes.for_sbatch(entries, sbatch))
        return 0
    if add:
        print(bad_nodes.add(entries, add, why))
    if clear:
        print(bad_nodes.clear(entries, clear))
    if not add and not clear:
        bad_nodes.show_nodes(entries, screen())
    return 0
