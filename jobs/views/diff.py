"""`qwenlora diff RUN RUN`: prints in what two runs differ: config, code, data and results."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenlora.configs.keys import FIELDS, differences
from qwenlora.jobs.views.overview import RunOverview, read_overview, settings
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import ago, as_yaml, number, printable
from qwenlora.run.history import goodput
from qwenlora.run.records import Code, SideName

COUNTS = (
    "rows",
    "tokens",
    "trained_tokens",
    "packs",
    "longest",
    "truncated",
    "dropped",
    "split",
    "duplicates",
)
SIDES: tuple[SideName, ...] = ("train", "eval")
NOTHING = "-"
QUESTIONS = ": questions"  # after a set's name: their number; if it differs, so do the questions
Value = str | float | None  # a number is compared as it is, and shown short
Pairs = dict[str, tuple[str, str]]  # {name: (value of the first run, of the second)} where they differ


def show_diff(first: Path, second: Path, console: Console) -> int:
    """Print how two runs differ; return the exit code. Raises: ValueError unless they are two runs."""
    one, other = (read_overview(RunFolder(path.expanduser())) for path in (first, second))
    if one.run.path.resolve() == other.run.path.resolve():
        raise ValueError(f"{first} and {second} are one run; name two")
    names = (one.name, other.name)
    if one.name == other.name:
        names = (printable(str(first)), printable(str(second)))
    for title, pairs in _sections(one, other).items():
        if pairs:
            console.print(_table(title, pairs, names))
        else:
            console.print(f"{title}: the same", style="dim")
    for name, run in zip(names, (one, other), strict=True):
        for flaw in run.flaws:
            console.print(f"{name}: {printable(flaw)}", soft_wrap=True, style="yellow")
    return 0


def _sections(one: RunOverview, other: RunOverview) -> dict[str, Pairs]:
    """Return {section: differences}; without the config where one cannot be read."""
    sections = {"config": config(one, other)} if one.config and other.config else {}
    sections |= {"code": _differing(code(one), code(other)), "data": _differing(data(one), data(other))}
    sections["results"] = _differing(results(one), results(other))
    if measures(one) and measures(other):
        sections["results"] |= _differing(measures(one), measures(other))
    return sections


def config(one: RunOverview, other: RunOverview) -> Pairs:
    """Return the settings that differ, except where the runs lie. Both configs must be readable."""
    assert one.config
    assert other.config
    different = differences(one.config, other.config).keys() - {"run_dir"}
    values, others = settings(one.config), settings(other.config)
    return {key: (as_yaml(values[key]), as_yaml(others[key])) for key in FIELDS if key in different}


def code(run: RunOverview) -> dict[str, str]:
    """Return what is known of a run's code: the commit, a hash of uncommitted changes, versions."""
    changes = run.run.diff.read_bytes() if run.run.diff.is_file() else b""
    recorded = run.code or Code()
    known = {
        "git commit": (recorded.git or NOTHING).removesuffix("-dirty"),
        "changed since": hashlib.sha256(changes).hexdigest()[:12] if changes else "nothing",
        "python": recorded.python,
        **recorded.versions,
    }
    return {key: printable(value or NOTHING) for key, value in known.items()}


def data(run: RunOverview) -> dict[str, str]:
    """Return what is known of the rows, as counts and as a hash of what was prepared, and of the base."""
    known: dict[str, str] = {}
    for side in SIDES:
        counts = run.counts(side)
        known |= {f"{side} {key.replace('_', ' ')}": number(getattr(counts, key, None)) for key in COUNTS}
        known[f"{side} sha256"] = counts.sha256[:12] if counts else NOTHING
    facts = run.facts
    known["packing"] = as_yaml(facts.packing) if facts else NOTHING
    known["bad rows left out"] = number(facts.bad_rows if facts else None)
    known["base weights"] = printable(facts.base_fingerprint) if facts else NOTHING
    return known


def results(run: RunOverview) -> dict[str, Value]:
    """Return how far a run is, its last losses, its times, and whether it was compared."""
    trained_s = sum(attempt.trained_s for attempt in run.attempts)
    share = goodput(run.attempts)
    compared = sum(not key.endswith(QUESTIONS) for key in measures(run))
    return {
        "state": run.state,
        "steps": run.step,
        "loss": run.loss.get("loss"),
        "eval loss": run.evaluated.get("eval_loss"),
        "eval perplexity": run.evaluated.get("eval_perplexity"),
        "attempts": len(run.attempts),
        "trained for": ago(trained_s) if trained_s else NOTHING,
        "goodput": f"{share:.0%}" if share is not None else NOTHING,
        "compared": f"by {compared} measures" if compared else "not yet: qwenlora compare",
    }


def measures(run: RunOverview) -> dict[str, Value]:
    """Return what comparison.json says of the run's own adapter; {} when that was not compared."""
    known: dict[str, Value] = {}
    subjects = run.compared.subjects if run.compared else []
    own = [
        position
        for position, subject in enumerate(subjects)
        if subject.own and subject.adapter == run.run.adapter.name
    ]
    if not run.compared or not own:
        return known
    for measure in run.compared.measures:
        value = measure.values[own[-1]]
        is_share = measure.kind == "share" and value is not None
        known[f"{measure.set}: {measure.measure}"] = f"{value:.1%}" if is_share else value
        known[f"{measure.set}{QUESTIONS}"] = number(measure.count)
    return known


def _differing(one: Mapping[str, Value], other: Mapping[str, Value]) -> Pairs:
    """Return the values that differ, even where they look alike when they are rounded."""
    both = {key: (one.get(key, NOTHING), other.get(key, NOTHING)) for key in {**one, **other}}
    return {key: _as_texts(*values) for key, values in both.items() if values[0] != values[1]}


def _as_texts(one: Value, other: Value) -> tuple[str, str]:
    """Return two values short, or in full where they would look alike."""
    first, second = (value if isinstance(value, str) else number(value) for value in (one, other))
    return (first, second) if first != second else (str(one), str(other))


def _table(title: str, pairs: Pairs, names: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True, style="cyan")
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in pairs.items():
        table.add_row(printable(key), *values)
    return table
