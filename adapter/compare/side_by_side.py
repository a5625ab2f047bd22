"""A comparison on the terminal: measures in a table; answers side by side, or below on a narrow screen."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwenlora.adapter.compare.measures import normalize
from qwenlora.adapter.compare.questions import TITLES
from qwenlora.run.comparison import AnsweredQuestion, Comparison, Measure

NARROWEST = 26  # characters; in narrower columns texts go below each other
LONGEST = 300  # characters shown of a text
WORDS = {"similarity": "similar (ROUGE-L)", "different": "different answers", "holds": "hold the reference"}
_DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder text around them


def clean(text: str) -> str:
    """Return a text without the controls that a terminal obeys, and without changes of direction."""

    def is_kept(character: str) -> bool:
        is_control = unicodedata.category(character) in ("Cc", "Cs") and character != "\n"
        return not is_control and character not in _DIRECTION_MARKS

    return "".join(filter(is_kept, text.replace("\t", "    ")))


def print_comparison(comparison: Comparison, shown: int, console: Console) -> None:
    """Print the measures, and some answers. shown: how many of each set."""
    labels = [clean(model.label) for model in comparison.subjects]
    width = max(8, *(min(len(label), 20) for label in labels)) + 2
    names = 2 + max((len(_name(measure)) for measure in comparison.measures), default=0)
    at_once = max(1, (console.width - max(names, 34)) // width)
    for start in range(0, len(labels), at_once):  # many models: several tables
        console.print(_measures(comparison, labels, slice(start, start + at_once)))
    if not shown:
        return
    by_set = comparison.answers_by_set
    for name in filter(by_set.get, TITLES):
        rows = by_set[name]
        console.print(Text(f"\n{TITLES[name]}", style="bold"))
        if name == "repeated":
            console.print(_text(f"{rows[0].question}\n{rows[0].reference}"))
            _print_table(console, *_most_frequent(rows, labels, shown))
        else:
            _print_table(console, *_evenly_spread(rows, labels, shown))


def _measures(comparison: Comparison, labels: list[str], columns: slice) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for label in labels[columns]:
        table.add_column(Text(label), justify="right", overflow="fold", max_width=20)
    for name, group in groupby(comparison.measures, key=lambda measure: measure.set):
        measures = list(group)
        table.add_row(Text(f"{TITLES.get(name, name)}: {measures[0].count}", style="cyan"))
        for measure in measures:
            table.add_row(
                Text(f"  {_name(measure)}"), *(_value(measure, value) for value in measure.values[columns])
            )
    return table


def _name(measure: Measure) -> str:
    kind = measure.measure.removeprefix("right: ")
    return f"{clean(kind)} ({measure.count})" if kind != measure.measure else WORDS.get(kind, clean(kind))


def _value(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    if measure.kind == "share":
        return f"{value:.1%}"
    if measure.measure == "different":
        return f"{value:.0f}"
    return f"{value:,.4f}" if value < 10 else f"{value:,.1f}"


def _evenly_spread(
    answered: list[AnsweredQuestion], labels: list[str], shown: int
) -> tuple[list[str], list[list[Text]]]:
    """Return headers and rows: the question, its reference, each model's answer; some, from first to last."""
    count = min(shown, len(answered))
    rows = []
    for row in (answered[number * len(answered) // count] for number in range(count)):
        answers = [_answer(*pair) for pair in zip(row.answers, row.right, strict=True)]
        rows.append([_text(row.question), _text(row.reference), *answers])
    return ["question", "expected", *labels], rows


def _most_frequent(
    answered: list[AnsweredQuestion], labels: list[str], shown: int
) -> tuple[list[str], list[list[Text]]]:
    """Return headers and rows: each model's most frequent answers, with how often each was given."""
    columns = []
    for number in range(len(labels)):
        right = {normalize(row.answers[number]): row.right[number] for row in answered}
        counts = Counter(normalize(row.answers[number]) for row in answered).most_common(shown)
        columns.append([_answer(text, right[text]).append(f"  {n}x", style="cyan") for text, n in counts])
    return labels, [list(row) for row in zip_longest(*columns, fillvalue=Text())]


def _answer(text: str, right: bool | None) -> Text:
    return _text(text or "(nothing)", {True: "green", False: "red", None: ""}[right])


def _text(text: str, style: str = "") -> Text:
    text = clean(text).strip()
    return Text(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...", style=style)


def _print_table(console: Console, headers: list[str], rows: Sequence[list[Text]]) -> None:
    if console.width // len(headers) >= NARROWEST:
        table = Table(show_lines=True)
        for header in headers:
            table.add_column(Text(header), overflow="fold", ratio=1)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    for row in rows:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="cyan", overflow="fold", max_width=20)
        table.add_column(overflow="fold")
        for header, text in zip(headers, row, strict=True):
            if text.plain:
                table.add_row(Text(header), text)
        console.print(table)
        console.print()
