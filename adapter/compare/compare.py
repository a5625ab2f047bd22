"""The base model and adapters on it, asked the same questions: `qwenlora compare runs/tiny`, docs/compare.md.

questions.py chooses the questions, results.py turns answers into measures, side_by_side.py prints them.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qwenlora.adapter import verify
from qwenlora.adapter.answers import generate_answers
from qwenlora.adapter.compare import losses, side_by_side
from qwenlora.adapter.compare.questions import (
    TITLES,
    ChosenQuestions,
    CompareOptions,
    QuestionSet,
    choose_questions,
)
from qwenlora.adapter.compare.results import ModelAnswers, ModelColumn, make_comparison
from qwenlora.adapter.loading import load
from qwenlora.adapter.merge.combined import BASE_CHANGING_STARTS
from qwenlora.adapter.outputs import free_file
from qwenlora.adapter.subject import Subject, read_adapter_config
from qwenlora.data.chat import Tokens
from qwenlora.run.comparison import Comparison
from qwenlora.run.disk import write_atomically
from qwenlora.trainer.model import base as models


def compare(subjects: list[Subject], options: CompareOptions | None = None) -> int:
    """Ask all models, print and keep the result; return the exit code. Raises: ValueError for bad files."""
    options = options or CompareOptions()
    chosen = choose_questions(subjects, options)
    target = _target(subjects, options.output)
    for subject in subjects[1:]:  # now: asking the first subject takes minutes
        if subject.adapter:
            verify.check_adapter(subject)
    console = Console(highlight=False)
    for note in chosen.notes:
        _print_note(console, note)
    columns = columns_of(subjects)
    answers: list[ModelAnswers] = []
    for _, group in groupby(columns, key=lambda column: (column.subject.name, column.subject.adapter)):
        answers += _ask_subject(list(group), chosen, options, answers[0] if answers else None, console)
    comparison = make_comparison(columns, chosen.sets, answers, options.seed, target)
    side_by_side.print_comparison(comparison, options.show, console)
    for warning in _warnings(comparison, columns, answers, options.max_new_tokens):
        _print_note(console, warning)
    if target:
        _keep(comparison, target, requested=options.output is not None)
    if "training" in comparison.answers_by_set:
        print(f"exact answers to training questions: {_exact_counts(comparison)}")
    return 0


def columns_of(subjects: list[Subject]) -> list[ModelColumn]:
    """Return the models to ask, in order: the subjects, each base before the first subject made of it."""
    columns: list[ModelColumn] = []
    bases = [_base_identity(subject) for subject in subjects]
    for number, subject in enumerate(subjects):
        if bases[number] not in bases[:number]:
            name = "base" if len(set(bases)) == 1 else f"base of {subject.label}"
            label = name if subject.adapter else subject.label
            columns.append(ModelColumn(label, _base_of(subject), tuned=False))
        if subject.adapter:
            columns.append(ModelColumn(subject.label, subject, tuned=True))
    times: dict[str, int] = {}
    for place, column in enumerate(columns):  # two runs may have folders of the same name
        times[column.label] = times.get(column.label, 0) + 1
        if times[column.label] > 1:
            columns[place] = column._replace(label=f"{column.label} ({times[column.label]})")
    return columns


def _base_of(subject: Subject) -> Subject:
    """Return the subject to load for a base: itself, unless its adapter cannot be switched off."""
    config = read_adapter_config(subject.adapter) if subject.adapter else {}
    # peft does not restore biases, nor weights of the base that these starts change
    changes_base = str(config.get("init_lora_weights")).startswith(BASE_CHANGING_STARTS)
    if config.get("bias", "none") != "none" or changes_base:
        return replace(subject, adapter=None)
    return subject


def _base_identity(subject: Subject) -> tuple[str, ...]:
    """Return a base's weights and how they are loaded, not its path: each tiny run has a copy of its base."""
    config = subject.config
    return models.fingerprint(config, subject.base), config.model.dtype, str(config.strategy.quantization)


def _ask_subject(
    columns: list[ModelColumn],
    chosen: ChosenQuestions,
    options: CompareOptions,
    first: ModelAnswers | None,
    console: Console,
) -> list[ModelAnswers]:
    """Load a subject, ask its columns, free it for the next. first: the first column's answers, if known."""
    subject = columns[0].subject
    model, tokenizer = load(subject)
    answers: list[ModelAnswers] = []
    rows = {
        each.name: losses.trained_tokens(tokenizer, each.rows, chosen.data)
        for each in chosen.sets
        if each.rows
    }
    if first is None:
        _warn_of_long_references(tokenizer, chosen.sets, options.max_new_tokens, console)
    try:
        for column in columns:
            without_adapter = subject.adapter is not None and not column.tuned
            with model.disable_adapter() if without_adapter else nullcontext():
                answers.append(_ask_model(column.label, model, tokenizer, chosen.sets, rows, options, first))
            first = first or answers[0]
    except torch.OutOfMemoryError:
        raise ValueError(f"the GPU is full with --batch-size {options.batch_size}; halve it") from None
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers


def _ask_model(
    label: str,
    model: Any,
    tokenizer: Any,
    sets: list[QuestionSet],
    rows: dict[str, list[Tokens]],
    options: CompareOptions,
    first: ModelAnswers | None,
) -> ModelAnswers:
    answers = ModelAnswers({}, {})
    for question_set in sets:
        name, questions = question_set.name, question_set.questions
        title = f"{label}: {TITLES[name]}"
        sampling = options.sampling(name)
        answers.answers[name] = list(
            generate_answers(model, tokenizer, questions, sampling, title, batch_size=options.batch_size)
        )
        tokens = rows.get(name, [])
        if name == "general":
            texts = [answer.text for answer in (first or answers).answers["general"]]
            tokens = losses.answer_tokens(tokenizer, questions, texts)
        answers.losses[name] = losses.mean_loss(
            model, tokens, tokenizer.pad_token_id, f"{title}, loss", batch_size=options.batch_size
        )
    return answers


def _warn_of_long_references(tokenizer: Any, sets: list[QuestionSet], longest: int, console: Console) -> None:
    for question_set in sets:
        texts = [question.reference for question in question_set.questions if question.reference]
        if question_set.name == "repeated" or not texts:
            continue
        lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
        if longer := sum(length > longest for length in lengths):
            _print_note(
                console,
                f"{longer} of {len(texts)} {TITLES[question_set.name]} have references longer than"
                f" --max-new-tokens {longest}: answers to them are cut and cannot be exact",
            )


def _warnings(
    comparison: Comparison, columns: list[ModelColumn], answers: list[ModelAnswers], max_new_tokens: int
) -> Iterator[str]:
    if not any(row.right[0] for row in comparison.answers_by_set["general"]):
        yield f"{columns[0].label} itself passes none of the general questions: they tell nothing here"
    for column, its in zip(columns, answers, strict=True):
        every = [answer for of_set in its.answers.values() for answer in of_set]
        if cut := sum(answer.cut and bool(answer.thought) and not answer.answer for answer in every):
            yield (
                f"{column.label}: {cut} answers are empty, being cut within the thought at --max-new-tokens"
                f" {max_new_tokens}; give more"
            )


def _target(subjects: list[Subject], output: Path | None) -> Path | None:
    """Return where the comparison goes. Raises: ValueError when the user's file cannot be written."""
    if output is None:
        runs = [subject.run for subject in subjects if subject.run]
        return runs[-1].comparison if runs else None
    return free_file(output, "--output")


def _keep(comparison: Comparison, target: Path, *, requested: bool) -> None:
    try:
        write_atomically(target, comparison.text() + "\n")
    except OSError as error:
        if requested:
            raise ValueError(f"--output {target} cannot be written: {error.strerror}") from None
        print(
            f"warning: {target} cannot be written: {error.strerror}; --output FILE names another",
            file=sys.stderr,
        )


def _exact_counts(comparison: Comparison) -> str:
    rows = comparison.answers_by_set["training"]
    parts = []
    for number, model in enumerate(comparison.subjects):
        right = sum(bool(row.right[number]) for row in rows)
        label = side_by_side.clean(model.label).replace("\n", " ")
        parts.append(f"{label} {right} of {len(rows)} ({right / len(rows):.1%})")
    return ", ".join(parts)


def _print_note(console: Console, note: str) -> None:
    console.print(side_by_side.clean(note), markup=False, soft_wrap=True)
