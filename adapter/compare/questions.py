"""What compare.py asks: training questions, the same in other words, general ones, and one of them many
times."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from qwenlora.adapter.answers import Question, check_text, question_of
from qwenlora.adapter.compare.general import General
from qwenlora.adapter.compare.general import read as read_general
from qwenlora.adapter.subject import Subject
from qwenlora.configs.schema import Data, Sources
from qwenlora.data.prepared import other_files
from qwenlora.data.rows import Row
from qwenlora.data.survey import rows_of_side, survey

TITLES = {
    "training": "training questions",
    "rephrased": "rephrased questions",
    "evaluation": "evaluation questions",
    "general": "general questions",
    "repeated": "one question, asked again and again",
}


class Set(NamedTuple):
    """Questions of one kind. name: one of TITLES. rows: those they begin, whose loss is taken; checks:
    general's."""

    name: str
    questions: list[Question]
    rows: list[Row]
    checks: list[General]


class Asked(NamedTuple):
    """All that is asked. data: how rows become tokens. notes: what is left out or taken from where, for the
    user."""

    sets: list[Set]
    data: Data
    notes: list[str]


def choose(
    subjects: list[Subject],
    *,
    limit: int,
    rephrased: Path | None,
    general: Path | None,
    question: str | None,
    samples: int,
) -> Asked:
    """Return what subjects are asked; nothing but data files is read.

    limit: of each set; of rows the first, of general questions some of each kind.
    Raises: ValueError for files that are not there or cannot be used.
    """
    runs = [subject for subject in subjects if subject.run]
    data = runs[0].config.data if runs else subjects[0].config.data
    sets, notes = [], []
    if runs:
        sets.append(_of_rows("training", rows_of_side(data, "train"), limit))
        if (run := runs[0].run) and run.facts.is_file() and other_files(runs[0].config, run):
            notes.append(
                f"warning: {runs[0].label}'s data files changed since it was trained; the questions may not"
                " be those that it learnt"
            )
        if len(runs) > 1:
            notes.append(
                f"the training questions are those of {runs[0].label}: data.train={_name(data.train)}"
            )
        if not sets[-1].questions:
            notes.append(
                f"no training questions: no row of data.train={_name(data.train)} begins with a question"
            )
    else:
        notes.append("no training questions: name a run for its own, or give some with --rephrased FILE")
    if others := _others(data if runs else None, data, limit, rephrased):
        sets.append(others)
    elif runs:
        notes.append("no rephrased questions: --rephrased FILE asks some, in rows as for training")
    checks = _spread(read_general(general), limit)
    asked = [Question([{"role": "user", "content": check.question}]) for check in checks]
    sets.append(Set("general", asked, [], checks))
    if samples and (one := _one(question, sets)):
        sets.append(Set("repeated", [one] * samples, [], []))
    return Asked([one for one in sets if one.questions], data, notes)


def _of_rows(name: str, rows: Iterable[tuple[str, Row]], limit: int) -> Set:
    found = ((question, row) for _, row in rows if (question := question_of(row)))
    pairs = list(islice(found, limit))
    return Set(name, [question for question, _ in pairs], [row for _, row in pairs], [])


def _others(trained: Data | None, data: Data, limit: int, file: Path | None) -> Set | None:
    """Return questions that were not trained: of the user's file, of the example, or those of the run's
    evaluation."""
    if file:
        if not file.is_file():
            raise ValueError(f"--rephrased {file}: no such file (looked for {file.absolute()})")
        alone = _alone(data, str(file)).model_copy(update={"on_bad_row": "error"})
        survey(alone)
        found = _of_rows("rephrased", rows_of_side(alone, "train"), limit)
        if not found.questions:
            raise ValueError(
                f"--rephrased {file}: no row begins with a question; expected rows as for training"
            )
        return found
    if trained is None:
        return None
    if trained.train == "example":
        return _of_rows("rephrased", rows_of_side(Data(train="example", eval="example"), "eval"), limit)
    if trained.eval is not None:  # by itself: all training rows would be read first
        return _of_rows("evaluation", rows_of_side(_alone(trained, trained.eval), "train"), limit)
    if trained.eval_fraction:
        return _of_rows("evaluation", rows_of_side(trained, "eval"), limit)
    return None


def _alone(data: Data, train: Sources) -> Data:
    return data.model_copy(update={"train": train, "eval": None, "eval_fraction": None})


def _one(text: str | None, sets: list[Set]) -> Question | None:
    """Return the question to repeat, with its reference where it is one that was asked."""
    known = [question for one in sets if one.rows for question in one.questions]
    if text is None:
        return known[0] if known else None
    check_text(text, "--question")
    same = (question for question in known if question.messages[-1]["content"].strip() == text.strip())
    return next(same, Question([{"role": "user", "content": text}]))


def _spread(checks: list[General], limit: int) -> list[General]:
    count = min(limit, len(checks))
    return [checks[number * len(checks) // count] for number in range(count)]


def _name(sources: Sources) -> str:
    listed: Iterator[object] = iter(sources if isinstance(sources, list) else [sources])
    return ", ".join(one if isinstance(one, str) else str(getattr(one, "path", one)) for one in listed)
