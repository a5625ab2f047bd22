"""The questions of `qwenlora compare`: training questions, rephrased ones, general ones, and one repeated."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from qwenlora.adapter.answers import Question, Sampling, check_text, question_of
from qwenlora.adapter.compare.general import GeneralQuestion, read_general_questions
from qwenlora.adapter.subject import Subject
from qwenlora.configs.schema import Data, Sources
from qwenlora.data import sources
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


class CompareOptions(NamedTuple):
    """The command's options. show: answers printed of each set; limit: questions asked of each set.

    samples: how often one question is repeated, at this temperature; output: default RUN/comparison.json.
    """

    show: int = 5
    limit: int = 500
    max_new_tokens: int = 128
    rephrased: Path | None = None
    general: Path | None = None
    question: str | None = None
    samples: int = 20
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 40
    output: Path | None = None

    def sampling(self, name: str) -> Sampling:
        """Return how the questions of a set are answered: greedily, but for the repeated question."""
        if name == "repeated":
            return Sampling(self.max_new_tokens, self.temperature, seed=self.seed)
        return Sampling(self.max_new_tokens)


class QuestionSet(NamedTuple):
    """Questions of a kind. name: a key of TITLES; rows: to measure losses; checks: of general questions."""

    name: str
    questions: list[Question]
    rows: Sequence[Row] = ()
    checks: Sequence[GeneralQuestion] = ()


class ChosenQuestions(NamedTuple):
    """All questions. data: how rows become tokens; notes: for the user, on missing sets and on sources."""

    sets: list[QuestionSet]
    data: Data
    notes: list[str]


def choose_questions(subjects: list[Subject], options: CompareOptions) -> ChosenQuestions:
    """Return the questions to ask; reads only data files. Raises: ValueError for missing or bad files."""
    runs = [subject for subject in subjects if subject.run]
    data = (runs or subjects)[0].config.data
    sets: list[QuestionSet] = []
    if missing := _missing_rows(runs):
        notes = [f"no training questions: {missing}; --rephrased FILE asks some"]
    else:
        sets, notes = _training_set(runs, options.limit)
    if others := _untrained_set([] if missing else runs, data, options):
        sets.append(others)
    elif runs and not missing:
        notes.append("no rephrased questions: --rephrased FILE asks some, in rows as for training")
    sets.append(_general_set(options))
    if options.samples and (question := _question_to_repeat(options.question, sets)):
        sets.append(QuestionSet("repeated", [question] * options.samples))
    return ChosenQuestions([each for each in sets if each.questions], data, notes)


def _missing_rows(runs: list[Subject]) -> str:
    """Return why the first run's rows cannot be read, as after a move; empty if nothing is missing."""
    try:
        if runs:
            sources.find(runs[0].config.data)
    except ValueError as error:
        return str(error)
    return ""


def _training_set(runs: list[Subject], limit: int) -> tuple[list[QuestionSet], list[str]]:
    """Return the questions that the first run was trained on, and notes about them."""
    if not runs:
        return [], ["no training questions: name a run for its own, or give some with --rephrased FILE"]
    first, notes = runs[0], []
    data = first.config.data
    training = _set_of_rows("training", rows_of_side(data, "train"), limit)
    if first.run and first.run.facts.is_file() and other_files(first.config, first.run):
        notes.append(
            f"warning: {first.label}'s data files changed since it was trained; the questions may not be"
            " those that it learnt"
        )
    if len(runs) > 1:
        notes.append(f"the training questions are those of {first.label}: data.train={_names(data.train)}")
    if not training.questions:
        notes.append(
            f"no training questions: no row of data.train={_names(data.train)} begins with a question"
        )
    return [training], notes


def _untrained_set(runs: list[Subject], data: Data, options: CompareOptions) -> QuestionSet | None:
    """Return questions that were not trained: the user's, the example's, or those of the run's evaluation."""
    limit = options.limit
    if options.rephrased:
        return _read_rephrased(options.rephrased, data, limit)
    if not runs:
        return None
    if data.train == "example":
        example = Data(train="example", eval="example")
        return _set_of_rows("rephrased", rows_of_side(example, "eval"), limit)
    if data.eval is not None:  # as training rows, or all real training rows would be read first
        return _set_of_rows("evaluation", rows_of_side(_only(data, data.eval), "train"), limit)
    if data.eval_fraction:
        return _set_of_rows("evaluation", rows_of_side(data, "eval"), limit)
    return None


def _read_rephrased(file: Path, data: Data, limit: int) -> QuestionSet:
    if not file.is_file():
        raise ValueError(f"--rephrased {file}: no such file (looked for {file.absolute()})")
    data = _only(data, str(file)).model_copy(update={"on_bad_row": "error"})
    survey(data)
    rephrased = _set_of_rows("rephrased", rows_of_side(data, "train"), limit)
    if not rephrased.questions:
        raise ValueError(f"--rephrased {file}: no row begins with a question; expected rows as for training")
    return rephrased


def _general_set(options: CompareOptions) -> QuestionSet:
    """Return general questions, evenly spread over the file, so that a limit leaves some of each kind."""
    checks = read_general_questions(options.general)
    count = min(options.limit, len(checks))
    checks = [checks[number * len(checks) // count] for number in range(count)]
    return QuestionSet("general", [Question.from_text(check.question) for check in checks], checks=checks)


def _set_of_rows(name: str, rows: Iterable[tuple[str, Row]], limit: int) -> QuestionSet:
    pairs = list(islice(((question, row) for _, row in rows if (question := question_of(row))), limit))
    return QuestionSet(name, [question for question, _ in pairs], [row for _, row in pairs])


def _only(data: Data, train: Sources) -> Data:
    """Return the settings with these training rows and no evaluation rows."""
    return data.model_copy(update={"train": train, "eval": None, "eval_fraction": None})


def _question_to_repeat(text: str | None, sets: list[QuestionSet]) -> Question | None:
    """Return the question to repeat, with its reference if it is in a set."""
    known = [question for each in sets if each.rows for question in each.questions]
    if text is None:
        return known[0] if known else None
    check_text(text, "--question")
    same = (question for question in known if question.messages[-1]["content"].strip() == text.strip())
    return next(same, Question.from_text(text))


def _names(sources: Sources) -> str:
    entries = sources if isinstance(sources, list) else [sources]
    return ", ".join(
        source if isinstance(source, str) else str(getattr(source, "path", source)) for source in entries
    )
