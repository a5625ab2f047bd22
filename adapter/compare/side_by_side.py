"""A comparison on the terminal: measures in a table, and answers beside each other, or below where it is
narrow."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwenlora.adapter.compare.measures import normal
from qwenlora.adapter.compare.questions import TITLES
from qwenlora.run.comparison import AnsweredQuestion, Comparison, Measure

NARROWEST = 26  # columns of the terminal that a text gets before texts go below each other
LONGEST = 300  # characters shown of a text
WORDS = {"similarity": "similar (ROUGE-L)", "different": "different answers", "holds": "hold the reference"}
_MARKS = frozenset(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # they reorder what stands around them


def clean(text: str) -> str:
    """Return a text without what a terminal would obey: escapes, other controls, changes of direction."""
    kept = (
        one
        for one in text.replace("\t", "    ")
        if one == "\n" or unicodedata.category(one) not in ("Cc", "Cs")
    )
    return "".join(one for one in kept if one not in _MARKS)


def show(comparison: Comparison, shown: int, console: Console) -> None:
    """Print the measures, and some answers of each set. shown: how many of each."""
    labels = [clean(subject.label) for subject in comparison.subjects]
    width = max(8, *(min(len(label), 20) for label in labels)) + 2
    names = 2 + max((len(_name(measure)) for measure in comparison.measures), default=0)
    at_once = max(1, (console.width - max(names, 34)) // width)
    for start in range(0, len(labels), at_once):  # below each other, where there are many
        console.print(_measures(comparison, labels, slice(start, start + at_once)))
    if not shown:
        return
    for name, title in TITLES.items():
        answers = [one for one in comparison.answers if one.set == name]
        if answers:
            console.print(Text(f"\n{title}", style="bold"))
            if name == "repeated":
                console.print(_text(f"{answers[0].question}\n{answers[0].reference}"))
                _print(console, *_repeated(answers, labels, shown))
            else:
                _print(console, *_some(answers, labels, shown))


def _measures(comparison: Comparison, labels: list[str], which: slice) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for label in labels[which]:
        table.add_column(Text(label), justify="right", overflow="fold", max_width=20)
    for name, group in groupby(comparison.measures, key=lambda measure: measure.set):
        measures = list(group)
        table.add_row(Text(f"{TITLES.get(name, name)}: {measures[0].count}", style="cyan"))
        for measure in measures:
            table.add_row(
                Text(f"  {_name(measure)}"), *(_value(measure, value) for value in measure.values[which])
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
    return (
        f"{value:.0f}"
        if measure.measure == "different"
        else f"{value:,.4f}"
        if value < 10
        else f"{value:,.1f}"
    )


def _some(
    answers: list[AnsweredQuestion], labels: list[str], shown: int
) -> tuple[list[str], list[list[Text]]]:
    """Return headers and rows: question, what is expected, each subject's answer; from first to last
    alike."""
    count = min(shown, len(answers))
    rows = []
    for one in (answers[number * len(answers) // count] for number in range(count)):
        texts = [_text(one.question), _text(one.reference)]
        rows.append(texts + [_answer(*pair) for pair in zip(one.answers, one.right, strict=True)])
    return ["question", "expected", *labels], rows


def _repeated(
    answers: list[AnsweredQuestion], labels: list[str], shown: int
) -> tuple[list[str], list[list[Text]]]:
    """Return headers and rows: each subject's most frequent answers, with how often each was given."""
    columns = []
    for number in range(len(labels)):
        right = {normal(one.answers[number]): one.right[number] for one in answers}
        found = Counter(normal(one.answers[number]) for one in answers).most_common(shown)
        columns.append(
            [_answer(said, right[said]).append(f"  {times}x", style="cyan") for said, times in found]
        )
    rows = max(map(len, columns))
    return labels, [
        [column[row] if row < len(column) else Text() for column in columns] for row in range(rows)
    ]


def _answer(text: str, right: bool | None) -> Text:
    return _text(text or "(nothing)", {True: "green", False: "red", None: ""}[right])


def _text(text: str, style: str = "") -> Text:
    text = clean(text).strip()
    return Text(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...", style=style)


def _print(console: Console, headers: list[str], rows: Sequence[list[Text]]) -> None:
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
