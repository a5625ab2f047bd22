"""The curves of a run, drawn once by matplotlib: as SVG for a page in light and dark, and as PNG."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qwenlora.adapter.publish.series import Series
from qwenlora.run.records import Attempt

# {name: (light, dark)}. Figures are drawn in light colours; an SVG then gets the page's CSS variables --name.
COLOURS = {
    "ink": ("#1c2128", "#e4e8ee"),
    "dim": ("#626c7a", "#98a2b0"),
    "line": ("#d8dde4", "#363d47"),
    "good": ("#2f9e5b", "#46b874"),
    "bad": ("#d1483f", "#ef6a60"),
    "first": ("#2563c9", "#6ea8ff"),
    "second": ("#c2680c", "#f0a04b"),
    "again": ("#8a6fc0", "#a78fdc"),
}
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": _LIGHT["ink"],
    "text.parse_math": False,
    "axes.edgecolor": _LIGHT["dim"],
    "axes.labelcolor": _LIGHT["dim"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": _LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LIGHT["line"],
    "grid.linewidth": 0.7,
    "xtick.color": _LIGHT["dim"],
    "ytick.color": _LIGHT["dim"],
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.subplot.left": 0.12,  # margins equal for all figures, which stand below each other
    "figure.subplot.right": 0.965,
    "figure.subplot.bottom": 0.165,
    "figure.subplot.top": 0.89,
    "svg.fonttype": "none",  # text, not outlines
}
_INCHES = (4.6, 2.8)
_DPI = 200
_POINTS = 400  # drawn of a longer curve, over a band from the minimum to the maximum around each
FEW = 60  # points; a curve with more is smoothed
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60}  # seconds
_NUMBERED = 12  # restarts; more are not numbered


class Chart(NamedTuple):
    """A figure. name: part of its file's name; title: also read to people who cannot see it."""

    name: str
    title: str
    figure: Figure

    def svg(self) -> str:
        """Return an <svg> element for a page that defines COLOURS; it loads nothing."""
        with mpl.rc_context(_STYLE | {"svg.hashsalt": self.name}):  # ids differ between a page's figures
            text = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(text, format="svg", transparent=True, metadata=nothing)
        drawn = re.sub(r'<g id="[^"]*"', "<g", text.getvalue()[text.getvalue().index("<svg") :])
        for name, (light, _) in COLOURS.items():
            drawn = drawn.replace(light, f"var(--{name})")
        return drawn

    def write_png(self, path: Path) -> None:
        """Write the figure on white."""
        staging = path.with_name(f".{path.name}")
        with mpl.rc_context(_STYLE):
            self.figure.savefig(staging, format="png", dpi=_DPI, facecolor="white")
        staging.replace(path)


def restarts(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that trained steps, without the first."""
    return [attempt for attempt in attempts if attempt.first_step][1:]


def draw_charts(curves: dict[str, Series], attempts: Sequence[Attempt]) -> list[Chart]:
    """Return the charts of the logged curves. attempts: marked where they begin."""
    drawings: dict[str, tuple[str, Callable[[Axes], None]]] = {
        "loss": ("Loss", lambda axes: _loss(axes, curves)),
        "learning_rate": ("Learning rate", lambda axes: _plain(axes, curves["learning_rate"])),
        "grad_norm": ("Gradient norm", lambda axes: _smooth(axes, curves["grad_norm"], log_above=30)),
        "tokens_per_s": ("Tokens per second", lambda axes: _from_zero(axes, curves["tokens_per_s"])),
        "slowest_rank_forward_s": ("Forward passes of a step, s", lambda axes: _paces(axes, curves)),
        "peak_memory_gb": ("Peak memory, GB", lambda axes: _plain(axes, curves["peak_memory_gb"], bottom=0)),
    }
    charts = []
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's matplotlibrc
        mpl.rcParams.update(_STYLE)
        for name, (title, drawing) in drawings.items():
            if name in curves and len(curves[name].finite.steps):
                figure, axes = _axes(title)
                drawing(axes)
                _mark_restarts(axes, attempts)
                charts.append(Chart(name, title, figure))
        if "time" in curves and len(curves["time"].finite.steps) > 1:
            figure, axes = _axes("Steps over time")
            _progress(axes, curves["time"].finite, attempts)
            charts.append(Chart("progress", "Steps over time", figure))
    return charts


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.tick_params(which="both", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(_short)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_short)
    axes.margins(x=0.02, y=0.06)
    return figure, axes


@FuncFormatter
def _short(value: float, position: int | None = None) -> str:
    if 10_000 <= abs(value) < 1e15:
        return EngFormatter(sep="")(value)  # 10k, 2M
    if 0 < abs(value) < 0.001 or abs(value) >= 1e15:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _loss(axes: Axes, curves: dict[str, Series]) -> None:
    _smooth(axes, curves["loss"], log_above=1000, label="training")
    evaluation = curves.get("eval_loss")
    if evaluation and evaluation.lowest:
        few = len(evaluation.steps) <= FEW
        _line(axes, evaluation, "second", label="evaluation", marker="o" if few else "", markersize=4)
        step, value = evaluation.lowest
        axes.plot(
            step, value, "o", color=_LIGHT["second"], markerfacecolor="none", markersize=9, label="lowest"
        )
    axes.legend(loc="lower right", bbox_to_anchor=(1.03, 0.965), ncols=4, handlelength=1, columnspacing=1)


def _plain(axes: Axes, series: Series, bottom: float | None = None) -> None:
    _line(axes, series, "first")
    if bottom is not None:
        axes.set_ylim(bottom=bottom)


def _paces(axes: Axes, curves: dict[str, Series]) -> None:
    """Draw the slowest rank's own time of a step, and the median's."""
    _line(axes, curves["slowest_rank_forward_s"], "bad", label="slowest rank")
    _line(axes, curves["rank_forward_s"], "first", label="median")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.03, 0.965), ncols=2, handlelength=1, columnspacing=1)


def _from_zero(axes: Axes, series: Series) -> None:
    _smooth(axes, series)
    axes.set_ylim(bottom=0)


def _smooth(axes: Axes, series: Series, *, log_above: float = np.inf, label: str = "") -> None:
    """Draw a series, a long one as its running median over a band, and crosses for non-finite values.

    log_above: a maximum above so many medians makes the axis logarithmic: spikes would flatten the rest.
    """
    values = series.finite.values
    if len(values) > FEW:
        _band(axes, series.finite)
        _line(axes, _running_median(series.finite), "first", label=label)
    else:
        _line(axes, series, "first", label=label)
    if values.min() > 0 and values.max() > log_above * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(_short)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(steps := series.not_finite):
        steps = steps[:: len(steps) // _POINTS + 1]
        bottom = axes.get_xaxis_transform()  # y as a share of the axis
        marks: dict[str, Any] = {"color": _LIGHT["bad"], "transform": bottom, "markersize": 5, "label": "NaN"}
        axes.plot(steps, np.full(len(steps), 0.03), "x", **marks)


def _line(axes: Axes, series: Series, colour: str, **more: Any) -> None:
    """Draw a line; of a long series, through the minimum and maximum of each part."""
    steps, values = series
    if len(steps) > 2 * _POINTS:
        parts = [(at[0], part.min(), part.max()) for at, part in _parts(series.finite)]
        steps = np.array([at for at, *_ in parts for _ in range(2)])
        values = np.array([value for _, *both in parts for value in both])
    elif len(steps) <= 2:
        more.setdefault("marker", "o")
    axes.plot(steps, values, color=_LIGHT[colour], **more)


def _band(axes: Axes, series: Series) -> None:
    if len(series.steps) <= _POINTS:
        axes.plot(*series, color=_LIGHT["first"], alpha=0.35, linewidth=0.8)
        return
    parts = [(at[0], part.min(), part.max()) for at, part in _parts(series)]
    axes.fill_between(*np.array(parts).T, color=_LIGHT["first"], alpha=0.25, linewidth=0)


def _parts(series: Series) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    yield from zip(np.array_split(series.steps, _POINTS), np.array_split(series.values, _POINTS), strict=True)


def _running_median(series: Series) -> Series:
    """Return medians over a fortieth of the series, at up to _POINTS steps: spikes do not move them."""
    steps, values = series
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), _POINTS)).round().astype(int))
    half = max(len(values) // 80, 1)
    return Series(steps[at], np.array([np.median(values[max(i - half, 0) : i + half + 1]) for i in at]))


def _mark_restarts(axes: Axes, attempts: Sequence[Attempt]) -> None:
    """Draw a dashed line where an attempt begins, and shade the steps that it trained again."""
    again = restarts(attempts)
    where = axes.get_xaxis_transform()
    left, right = axes.get_xlim()
    free_from = left
    many = len(again) > _NUMBERED
    dashes: dict[str, Any] = {
        "linestyle": (0, (4, 3)),
        "linewidth": 0.5 if many else 0.9,
        "alpha": 0.6 if many else 1,
    }
    for attempt in again:
        first = attempt.first_step or 0
        if repeated := attempt.steps_repeated:
            axes.axvspan(first, min(first + repeated, right), color=_LIGHT["again"], alpha=0.18, linewidth=0)
        axes.axvline(first, color=_LIGHT["dim"], zorder=1, **dashes)
        if not many and first >= free_from:
            name, colour = str(attempt.attempt), _LIGHT["dim"]
            offset: dict[str, Any] = {"xytext": (2.5, 0), "textcoords": "offset points", "va": "top"}
            axes.annotate(name, (first, 1), xycoords=where, fontsize=8.5, color=colour, **offset)
            free_from = first + (right - left) * 0.04
    axes.set_xlim(left, right)


def _progress(axes: Axes, times: Series, attempts: Sequence[Attempt]) -> None:
    """Draw the step over the time since the first attempt's start; shade the time in which nothing ran."""
    starts = [attempt.start.timestamp() for attempt in attempts]
    ends = [attempt.end.timestamp() for attempt in attempts if attempt.end]
    zero = min([float(times.values[0]), *starts])
    longest = max(*times.values, *ends) - zero
    unit, seconds = next(
        ((name, size) for name, size in _UNITS.items() if longest > 3 * size), ("seconds", 1)
    )
    new = np.searchsorted(times.values, starts[1:])  # the line has a gap before each attempt
    hours = np.insert((times.values - zero) / seconds, new, np.nan)
    steps = np.insert(times.steps.astype(float), new, np.nan)
    axes.plot(hours, steps, color=_LIGHT["first"], marker="o" if len(steps) <= 2 else "")
    for end, start in zip(ends, starts[1:], strict=False):
        axes.axvspan(
            (end - zero) / seconds, (start - zero) / seconds, color=_LIGHT["dim"], alpha=0.25, linewidth=0
        )
    axes.set_xlabel(f"{unit} since the first start", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
