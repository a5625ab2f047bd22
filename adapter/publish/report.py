"""A run written up as one HTML page that needs nothing else: `qwenlora report runs/tiny`.

write(run) fills report.html with what the run left (record.py) and its curves (curves.py). The page loads
nothing and runs no script; its figures lie beside it as PNGs, too.
"""

import math
import re
import shlex
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from qwenlora.adapter.publish import curves
from qwenlora.adapter.publish.curves import Chart
from qwenlora.adapter.publish.run_summary import Record, number, read, short
from qwenlora.run.disk import write_atomically
from qwenlora.run.folder import RunFolder

MARK = '<meta name="generator" content="qwenlora report">'  # by which a page of ours is known
ANSWERS = 24  # shown of each set at most, evenly spread
KEY_SETTINGS = (
    *("model.name_or_path", "model.dtype", "strategy.quantization", "strategy.name"),
    *("data.train", "data.eval", "data.eval_fraction", "data.max_length", "data.packing", "data.train_on"),
    *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.target_parameters"),
    *("lora.modules_to_save", "lora.use_rslora", "lora.use_dora", "lora.init_from"),
    *(
        "train.global_batch_size",
        "train.per_device_train_batch_size",
        "train.num_train_epochs",
        "train.max_steps",
    ),
    *(
        "train.learning_rate",
        "train.lr_scheduler_type",
        "train.warmup_steps",
        "train.optim",
        "train.weight_decay",
    ),
    *("train.max_grad_norm", "train.gradient_checkpointing", "train.seed"),
)


def write(run: RunFolder, html: Path | None = None) -> str:
    """Write the page, and its figures beside it as <page>-<figure>.png; return a line that says where.

    html: default RUN/report.html.
    Raises: ValueError for a folder without a run, and for a page that cannot be written there.
    """
    page = (html or run.report).expanduser()
    record = read(run)
    try:
        _check_place(page)
        charts = curves.charts(record.curves, record.attempts)
        shown = fill(record, charts)
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, shown)
        for chart in charts:
            chart.write_png(page.with_name(f"{page.stem}-{chart.name}.png"))
    except OSError as error:
        raise ValueError(f"cannot write {page}: {error.strerror}; --html names another place") from None
    beside = f", its {len(charts)} figures beside it as {page.stem}-*.png" if charts else ""
    return f"wrote {page}{beside}"


def _check_place(page: Path) -> None:
    """Refuse a name under which something else lies. Raises: ValueError."""
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"--html {page} is no name of a page; name a file that ends in .html")
    if not page.exists():
        return
    if page.is_file():
        with page.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    raise ValueError(f"--html {page} is there and is no report; choose another name")


def fill(record: Record, charts: list[Chart]) -> str:
    """Return the page."""
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template.filters |= {"number": number, "short": short, "python": repr, "shell": shlex.quote}
    source = resources.files("qwenlora.adapter.publish").joinpath("report.html").read_text(encoding="utf-8")
    state, said, ended = record.state
    settings = {key: _said(value) for key, value in record.settings.items() if value not in (None, False)}
    page = template.from_string(source).render(
        record=record,
        name=record.run.path.name,
        state=state,
        said=said,
        ended=ended,
        charts=[(chart.title, Markup(chart.svg())) for chart in charts],  # noqa: S704 - drawn from numbers
        colours=curves.COLOURS,
        sources={
            f"data.{side}": settings[f"data.{side}"]
            for side in ("train", "eval")
            if f"data.{side}" in settings
        },
        settings={key: settings[key] for key in KEY_SETTINGS if key in settings},
        command=shlex.join(map(str, record.code.command)),
        answers_shown=ANSWERS,
        mark=Markup(MARK),  # noqa: S704 - a constant
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    return _printable(page)


def _said(value: Any) -> str:
    """Return a setting as YAML has it, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


def _printable(text: str) -> str:
    """Return a text with pictures of its control characters (U+2400 on), and without what UTF-8 cannot
    hold."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
