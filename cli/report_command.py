"""`qwenlora report`."""

from pathlib import Path
from typing import Annotated

import typer

from qwenlora.adapter.publish.report import write_report
from qwenlora.cli.arguments import Run
from qwenlora.run.folder import RunFolder


def report(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="Where the page goes. Default: RUN/report.html.")] = None,
) -> int:
    """Write a run up as one HTML page: curves over all attempts, settings, data, comparison; pictures beside
    it."""
    print(write_report(RunFolder(run), html))
    return 0
