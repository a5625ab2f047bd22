"""`qwenlora watch`."""

import sys
from pathlib import Path
from typing import Annotated

from qwenlora.cli.arguments import run_argument
from qwenlora.jobs.find import find
from qwenlora.jobs.views.overview import is_run
from qwenlora.jobs.views.runs import run_folders
from qwenlora.jobs.views.watch import WatchApp
from qwenlora.jobs.views.watched import Watched, Watching


def watch(
    what: Annotated[
        str, run_argument("RUN|DIR|JOB", "A run folder, a folder of runs, or a job's id.")
    ] = "runs",
) -> int:
    """Show runs and jobs as they go on, in the terminal: state, losses, speed, time left; keys to open, log,
    cancel and resume them.

    Example: qwenlora watch runs
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("watch needs a terminal; use qwenlora runs DIR, or qwenlora status RUN")
    folder, watching = Path(what).expanduser(), Watching()

    def read() -> list[Watched]:
        if folder.is_dir() and not is_run(folder.absolute()):
            return watching.read(run_folders(folder))
        named = find(what)
        return watching.read(named.sweep or [named.only_run("watch")])

    read()  # what cannot be watched is refused before the screen is taken
    WatchApp(read, what).run()
    return 0
