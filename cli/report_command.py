"""`qwenlora report`."""

from pathlib import Path
from typing import Annotated

import typer

from qwenlora.adapter.publish.live import LiveReport
from qwenlora.adapter.publish.report import write_report
from qwenlora.cli.arguments import Run
from qwenlora.run.folder import RunFolder


def report(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="Where the page goes. Default: RUN/report.html.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page to this machine's browsers, as the run goes on.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="With --live. Default: a free one.")
    ] = None,
) -> int:
    """Write a run up as one HTML page: curves over all attempts, settings, data, comparison; pictures beside
    it.

    Example: qwenlora report runs/my --live
    """
    if not live:
        if port:
            raise ValueError(f"--port {port} has no effect without --live; add it, or leave --port out")
        print(write_report(RunFolder(run), html))
        return 0
    if html:
        raise ValueError(f"--html {html} has no effect with --live, which writes nothing; leave one out")
    with LiveReport(RunFolder(run), port or 0) as server:
        print(server.said(), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
