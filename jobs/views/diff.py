"""`qwenlora diff RUN RUN`: in what two runs differ: config, code, data, results.

Only what differs is printed, key by key as `first | second`; a section in which nothing does says so in one
line.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenlora.configs.load import FIELDS, differences
from qwenlora.jobs.views.runs import Version, ago, as_yaml, digits, printable, read, settings
from qwenlora.run.folder import RunFolder
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
ASKED = ": questions"  # behind a set's name: how many; other numbers, other questions
Value = str | float | None  # a number is compared as it is, and shown short


def show(first: Path, second: Path, console: Console) -> int:
    """Print in what two runs differ; return the exit code. Raises: ValueError when one is no run, or both are
    one."""
    one, other = read(RunFolder(first.expanduser())), read(RunFolder(second.expanduser()))
    if one.run.path.resolve() == other.run.path.resolve():
        raise ValueError(f"{first} and {second} are one run; name two")
    names = (
        (one.name, other.name) if one.name != other.name else (printable(str(first)), printable(str(second)))
    )
    sections = {"config": config(one, other)} if one.config and other.config else {}
    sections |= {"code": _differing(code(one), code(other)), "data": _differing(data(one), data(other))}
    sections["results"] = _differing(results(one), results(other))
    if measures(one) and measures(other):
        sections["results"] |= _differing(measures(one), measures(other))
    for title, rows in sections.items():
        console.print(
            _table(title, rows, names) if rows else f"{title}: the same", style=None if rows else "dim"
        )
    for name, version in zip(names, (one, other), strict=True):
        for flaw in version.flaws:
            console.print(f"{name}: {printable(flaw)}", soft_wrap=True, style="yellow")
    return 0


def config(one: Version, other: Version) -> dict[str, tuple[str, str]]:
    """Return {dotted key: (its value in one, in the other)} of settings that differ, but for where the runs
    lie."""
    assert one.config
    assert other.config
    different = differences(one.config, other.config)
    values, others = settings(one.config), settings(other.config)
    return {
        key: (as_yaml(values[key]), as_yaml(others[key]))
        for key in FIELDS
        if key in different and key != "run_dir"
    }


def code(version: Version) -> dict[str, str]:
    """Return what is known of a run's code: the commit, what was changed since, versions."""
    changes = version.run.diff.read_bytes() if version.run.diff.is_file() else b""
    recorded = version.code or Code()
    known = {
        "git commit": (recorded.git or NOTHING).removesuffix("-dirty"),
        "changed since": hashlib.sha256(changes).hexdigest()[:12] if changes else "nothing",
        "python": recorded.python,
        **recorded.versions,
    }
    return {key: printable(str(value or NOTHING)) for key, value in known.items()}


def data(version: Version) -> dict[str, str]:
    """Return what is known of the rows, as counts and as a hash of what was prepared of them, and of the
    base."""
    known: dict[str, str] = {}
    for side in SIDES:
        counts = version.counts(side)
        known |= {f"{side} {key.replace('_', ' ')}": digits(getattr(counts, key, None)) for key in COUNTS}
        known[f"{side} sha256"] = counts.sha256[:12] if counts else NOTHING
    facts = version.facts
    known["packing"] = as_yaml(facts.packing) if facts else NOTHING
    known["bad rows left out"] = digits(facts.bad_rows if facts else None)
    known["base weights"] = printable(facts.base_fingerprint) if facts else NOTHING
    return known


def results(version: Version) -> dict[str, Value]:
    """Return how far a run is, its last losses, its times, and whether it was compared."""
    trained = sum(attempt.trained_s for attempt in version.attempts)
    share = goodput(version.attempts)
    compared = sum(not key.endswith(ASKED) for key in measures(version))
    return {
        "state": version.state,
        "steps": version.step,
        "loss": version.loss.get("loss"),
        "eval loss": version.evaluated.get("eval_loss"),
        "eval perplexity": version.evaluated.get("eval_perplexity"),
        "attempts": len(version.attempts),
        "trained for": ago(trained) if trained else NOTHING,
        "goodput": f"{share:.0%}" if share is not None else NOTHING,
        "compared": f"by {compared} measures" if compared else "not yet: qwenlora compare",
    }


def measures(version: Version) -> dict[str, Value]:
    """Return what comparison.json says of the run's own adapter; {} when it was not among those that were
    asked."""
    known: dict[str, Value] = {}
    subjects = version.compared.subjects if version.compared else []
    own = [
        number
        for number, subject in enumerate(subjects)
        if subject.own and subject.adapter == version.run.adapter.name
    ]
    if not version.compared or not own:
        return known
    for measure in version.compared.measures:
        value = measure.values[own[-1]]
        is_share = measure.kind == "share" and value is not None
        known[f"{measure.set}: {measure.measure}"] = f"{value:.1%}" if is_share else value
        known[f"{measure.set}{ASKED}"] = digits(measure.count)
    return known


def _differing(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, tuple[str, str]]:
    """Return what differs as it is, not as it is shown: numbers that would look alike are shown whole."""
    both = {key: (one.get(key, NOTHING), other.get(key, NOTHING)) for key in {**one, **other}}
    different = {key: values for key, values in both.items() if values[0] != values[1]}
    return {key: _shown(*values) for key, values in different.items()}


def _shown(one: Value, other: Value) -> tuple[str, str]:
    short = tuple(value if isinstance(value, str) else digits(value) for value in (one, other))
    return (short[0], short[1]) if short[0] != short[1] else (str(one), str(other))


def _table(title: str, rows: dict[str, tuple[str, str]], names: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True, style="cyan")
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in rows.items():
        table.add_row(printable(key), *values)
    return table
