"""The measures of a comparison, made from the models' answers."""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from qwenlora.adapter.answers import Answer
from qwenlora.adapter.compare import losses, measures
from qwenlora.adapter.compare.questions import QuestionSet
from qwenlora.adapter.subject import Subject
from qwenlora.run.comparison import AnsweredQuestion, ComparedModel, Comparison, Measure

_Value = TypeVar("_Value")


class ModelColumn(NamedTuple):
    """A model to ask: a subject with its adapter (tuned), or its base alone."""

    label: str
    subject: Subject
    tuned: bool


class ModelAnswers(NamedTuple):
    """A model's answers and losses by set; for general questions, its loss of the first model's answers."""

    answers: dict[str, list[Answer]]
    losses: dict[str, float | None]


def make_comparison(
    columns: list[ModelColumn],
    sets: list[QuestionSet],
    answers: list[ModelAnswers],
    seed: int,
    target: Path | None,
) -> Comparison:
    """Return the comparison of the columns' answers. target: the file that it is for."""
    measured: list[Measure] = []
    rows: list[AnsweredQuestion] = []
    for question_set in sets:
        answered = [
            _answered(
                question_set, number, [its.answers[question_set.name][number].answer for its in answers]
            )
            for number in range(len(question_set.questions))
        ]
        measured += _measures(question_set.name, answered, [its.losses[question_set.name] for its in answers])
        rows += answered
    return Comparison(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        subjects=[_compared_model(column, target) for column in columns],
        measures=measured,
        answers=rows,
    )


def _compared_model(column: ModelColumn, target: Path | None) -> ComparedModel:
    run, adapter = column.subject.run, column.subject.adapter if column.tuned else None
    own = bool(adapter and run and target and target.absolute().parent == run.path)
    return ComparedModel(label=column.label, adapter=adapter.name if adapter else None, own=own)


def _answered(question_set: QuestionSet, number: int, texts: list[str]) -> AnsweredQuestion:
    """Return a question with its answers and whether they are right. number: the question's in its set."""
    question = question_set.questions[number]
    check = question_set.checks[number] if question_set.checks else None
    right: list[bool | None]
    if check:
        right = [check.expect.is_met(text) for text in texts]
    elif question_set.name != "repeated":
        right = [measures.is_exact(text, question.reference) for text in texts]
    elif question.reference:
        right = [measures.contains(text, question.reference) for text in texts]
    else:
        right = [None] * len(texts)
    return AnsweredQuestion(
        set=question_set.name,
        kind=check.kind if check else None,
        question=question.messages[-1]["content"],
        reference=str(check.expect) if check else question.reference,
        answers=texts,
        right=right,
    )


def _measures(name: str, rows: list[AnsweredQuestion], losses_: list[float | None]) -> Iterator[Measure]:
    """Yield the measures of a set, in the order in which they are shown. losses_: of each model."""
    if name == "general":
        yield _share(name, "right", rows, (row.right for row in rows))
        for kind in dict.fromkeys(row.kind for row in rows):
            of_kind = [row for row in rows if row.kind == kind]
            yield _share(name, f"right: {kind}", of_kind, (row.right for row in of_kind))
        yield _number(name, "perplexity", "lower", rows, map(losses.perplexity, losses_))
    elif name == "repeated":
        by_model = zip(*(row.answers for row in rows), strict=True)
        yield _number(name, "different", "lower", rows, map(measures.count_different, by_model))
        if rows[0].reference:
            yield _share(name, "holds", rows, (row.right for row in rows))
            yield _share(name, "exact", rows, _for_each_answer(measures.is_exact, rows))
    else:
        yield _share(name, "exact", rows, (row.right for row in rows))
        similar = zip(*_for_each_answer(measures.similarity, rows), strict=True)
        yield _number(name, "similarity", "higher", rows, (sum(values) / len(rows) for values in similar))
        yield _number(name, "loss", "lower", rows, losses_)


def _for_each_answer(
    measure: Callable[[str, str], _Value], rows: list[AnsweredQuestion]
) -> Iterator[list[_Value]]:
    """Yield the measure of each answer and its reference, for each row."""
    yield from ([measure(text, row.reference) for text in row.answers] for row in rows)


def _share(
    name: str, measure: str, rows: list[AnsweredQuestion], right: Iterable[Iterable[bool | None]]
) -> Measure:
    """Return the share of right answers. right: of each row, for each model."""
    values = [sum(map(bool, column)) / len(rows) for column in zip(*right, strict=True)]
    return Measure(
        set=name, measure=measure, kind="share", better="higher", count=len(rows), values=[*values]
    )


def _number(
    name: str,
    measure: str,
    better: Literal["higher", "lower"],
    rows: list[AnsweredQuestion],
    values: Iterable[float | None],
) -> Measure:
    return Measure(
        set=name, measure=measure, kind="number", better=better, count=len(rows), values=list(values)
    )
