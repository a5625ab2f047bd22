"""A run's report: one HTML page that loads nothing and runs no script: `qwenlora report runs/tiny`."""

import re
import shlex
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from qwenlora.adapter.publish import curves, report_lines
from qwenlora.adapter.publish.curves import Chart
from qwenlora.adapter.publish.run_summary import (
    LORA_SETTINGS,
    NOT_SHOWN,
    OPTIMIZER_SETTINGS,
    RunSummary,
    summarise_run,
)
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import as_yaml, number, short

MARK = '<meta name="generator" content="qwenlora report">'  # only pages with this are overwritten
ANSWERS = 24  # shown of each set at most, evenly spread
KEY_SETTINGS = (
    *("model.name_or_path", "model.dtype", "strategy.quantization", "strategy.name"),
    *("data.train", "data.eval", "data.eval_fraction", "data.max_length", "data.packing", "data.train_on"),
    *LORA_SETTINGS,
    *("train.global_batch_size", "train.per_device_train_batch_size"),
    *("train.num_train_epochs", "train.max_steps"),
    *OPTIMIZER_SETTINGS,
    *("train.max_grad_norm", "train.gradient_checkpointing", "train.seed"),
)


def write_report(run: RunFolder, html: Path | None = None) -> str:
    """Write the page (default RUN/report.html) and its figures, <page>-<figure>.png; return a line to print.

    Raises: ValueError for a folder without a run, and for a page that cannot be written there.
    """
    page = (html or run.report).expanduser()
    summary = summarise_run(run)
    try:
        _check_place(page)
        charts = curves.draw_charts(summary.curves, summary.attempts)
        text = render(summary, charts)
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, text)
        for chart in charts:
            chart.write_png(page.with_name(f"{page.stem}-{chart.name}.png"))
    except OSError as error:
        raise ValueError(f"cannot write {page}: {error.strerror}; --html names another place") from None
    beside = f", its {len(charts)} figures beside it as {page.stem}-*.png" if charts else ""
    return f"wrote {page}{beside}"


def _check_place(page: Path) -> None:
    """Raise ValueError when the name is no page's (.html, .htm), or belongs to a file that is no report."""
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"--html {page} is no name of a page; name a file that ends in .html")
    if not page.exists():
        return
    if page.is_file():
        with page.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    raise ValueError(f"--html {page} is there and is no report; choose another name")


def render(summary: RunSummary, charts: list[Chart]) -> str:
    """Return the page's HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "short": short, "python": repr, "shell": shlex.quote}
    template = resources.files("qwenlora.adapter.publish").joinpath("report.html").read_text(encoding="utf-8")
    state, message, end = report_lines.state(summary)
    settings = {key: as_yaml(value) for key, value in summary.settings.items() if value not in NOT_SHOWN}
    sources = {key: settings[key] for key in ("data.train", "data.eval") if key in settings}
    page = environment.from_string(template).render(
        summary=summary,
        name=summary.name,
        state=state,
        message=message,
        end=end,
        tiles=report_lines.tiles(summary),
        about=report_lines.about(summary),
        notes=list(report_lines.notes(summary)),
        legend=report_lines.legend(summary),
        wandb=report_lines.wandb(summary),
        attempts=report_lines.attempt_table(summary),
        ranks=report_lines.rank_table(summary),
        charts=[(chart.title, Markup(chart.svg())) for chart in charts],  # noqa: S704 - drawn from numbers
        colours=curves.COLOURS,
        sources=sources,
        settings={key: settings[key] for key in KEY_SETTINGS if key in settings},
        command=shlex.join(summary.code.command),
        answers_shown=ANSWERS,
        mark=Markup(MARK),  # noqa: S704 - a constant
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    return _printable(page)


def _printable(text: str) -> str:
    """Return a text with symbols (U+2400 on) for control characters, and without what UTF-8 cannot encode."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
