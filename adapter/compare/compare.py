"""The base model and what was made of it, asked the same questions: `qwenlora compare runs/tiny`.

Greedy answers to the training questions, to the same in other words, and to general ones; how likely each
model finds the references; one question asked again and again. docs/compare.md says how to read what comes
out. What is asked is asked.py's, comparison.json is comparison.py's, the screen is side_by_side.py's.
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from qwenlora.adapter import verify
from qwenlora.adapter.answers import Answer, Sampling, answers
from qwenlora.adapter.compare import losses, measures, side_by_side
from qwenlora.adapter.compare.questions import TITLES, Asked, Set, choose
from qwenlora.adapter.loading import load
from qwenlora.adapter.merge.combined import STARTS
from qwenlora.adapter.outputs import free_file
from qwenlora.adapter.subject import Subject, adapter_config
from qwenlora.run.comparison import AnsweredQuestion, ComparedModel, Comparison, Measure
from qwenlora.run.disk import write_atomically
from qwenlora.trainer.model import base as models


class How(NamedTuple):
    """How questions are asked: greedily; the repeated one by drawing."""

    greedy: Sampling
    drawn: Sampling
    batch_size: int


class Column(NamedTuple):
    """One that is asked: a subject with its adapter, or its base alone."""

    label: str
    subject: Subject
    tuned: bool


class Said(NamedTuple):
    """What one said. answers, losses: by set; of general questions, the loss of the first one's answers."""

    answers: dict[str, list[Answer]]
    losses: dict[str, float | None]


def compare(
    subjects: list[Subject],
    *,
    show: int = 5,
    limit: int = 500,
    max_new_tokens: int = 128,
    rephrased: Path | None = None,
    general: Path | None = None,
    question: str | None = None,
    samples: int = 20,
    temperature: float = 0.7,
    seed: int = 0,
    batch_size: int = 40,
    output: Path | None = None,
) -> int:
    """Ask all subjects and the bases they were made of, print what came out, keep it; return the exit code.

    The arguments are the command's options. Raises: ValueError for what cannot be read, loaded, or written.
    """
    asked = choose(
        subjects, limit=limit, rephrased=rephrased, general=general, question=question, samples=samples
    )
    target = _target(subjects, output)
    for subject in subjects[1:]:  # before the first is asked for minutes
        if subject.adapter:
            verify.check(subject)
    console = Console(highlight=False)
    for note in asked.notes:
        _say(console, note)
    greedy = Sampling(max_new_tokens)
    how = How(greedy, greedy._replace(temperature=temperature, seed=seed), batch_size)
    columns = columns_of(subjects)
    said: list[Said] = []
    for _, few in groupby(columns, key=lambda column: (column.subject.named, column.subject.adapter)):
        said += _ask(list(few), asked, how, said[0] if said else None, console)
    found = _found(columns, asked.sets, said, seed, target)
    side_by_side.show(found, show, console)
    if not any(row.right[0] for row in found.answers_by_set["general"]):
        _say(
            console, f"{columns[0].label} itself passes none of the general questions: they tell nothing here"
        )
    for column, its in zip(columns, said, strict=True):
        if unfinished := sum(
            one.cut and bool(one.thought) and not one.answer
            for answers in its.answers.values()
            for one in answers
        ):
            _say(
                console,
                f"{column.label}: {unfinished} answers are empty, being cut within the thought at"
                f" --max-new-tokens {max_new_tokens}; give more",
            )
    if target:
        _keep(found, target, asked_for=output is not None)
    if training := found.answers_by_set.get("training"):
        print(f"exact answers to training questions: {_counts(found, training)}")
    return 0


def columns_of(subjects: list[Subject]) -> list[Column]:
    """Return who is asked, in order: the subjects, each base before the first that was made of it."""
    found: list[Column] = []
    bases = [_base(subject) for subject in subjects]
    for number, subject in enumerate(subjects):
        if bases[number] not in bases[:number]:
            name = "base" if len(set(bases)) == 1 else f"base of {subject.label}"
            found.append(Column(name if subject.adapter else subject.label, _without(subject), tuned=False))
        if subject.adapter:
            found.append(Column(subject.label, subject, tuned=True))
    times: dict[str, int] = {}
    for place, column in enumerate(found):  # two runs may have folders of the same name
        times[column.label] = times.get(column.label, 0) + 1
        if times[column.label] > 1:
            found[place] = column._replace(label=f"{column.label} ({times[column.label]})")
    return found


def _without(subject: Subject) -> Subject:
    """Return what the base of a subject is loaded as: the subject, unless switching its adapter off leaves
    traces."""
    config = adapter_config(subject.adapter) if subject.adapter else {}
    # peft puts no bias back, and such starts change the base's own weights
    if config.get("bias", "none") != "none" or str(config.get("init_lora_weights")).startswith(STARTS):
        return replace(subject, adapter=None)
    return subject


def _base(subject: Subject) -> tuple[str, ...]:
    """Return what tells bases apart: weights and how they are loaded. Two runs of the tiny one have a copy
    each."""
    config = subject.config
    return models.fingerprint(config, subject.base), config.model.dtype, str(config.strategy.quantization)


def _ask(columns: list[Column], asked: Asked, how: How, first: Said | None, console: Console) -> list[Said]:
    """Load a subject, ask it and its base, as columns say, and let it go: two are never held at once."""
    subject = columns[0].subject
    model, tokenizer = load(subject)
    found: list[Said] = []
    rows = {
        one.name: losses.trained_tokens(tokenizer, one.rows, asked.data) for one in asked.sets if one.rows
    }
    if first is None:
        for one in asked.sets:
            _say_if_cut(tokenizer, one, how, console)
    try:
        for column in columns:
            bare = subject.adapter is not None and not column.tuned
            with model.disable_adapter() if bare else nullcontext():
                found.append(_asked(column.label, model, tokenizer, asked.sets, rows, how, first))
            first = first or found[0]
    except torch.OutOfMemoryError:
        raise ValueError(f"the GPU is full with --batch-size {how.batch_size}; halve it") from None
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _asked(
    label: str,
    model: Any,
    tokenizer: Any,
    sets: list[Set],
    rows: dict[str, list[Any]],
    how: How,
    first: Said | None,
) -> Said:
    said = Said({}, {})
    for one in sets:
        what = f"{label}: {TITLES[one.name]}"
        sampling = how.drawn if one.name == "repeated" else how.greedy
        said.answers[one.name] = list(
            answers(model, tokenizer, one.questions, sampling, what, batch_size=how.batch_size)
        )
        tokens = rows.get(one.name, [])
        if one.name == "general":
            its = (first or said).answers["general"]
            tokens = losses.answer_tokens(tokenizer, one.questions, [answer.text for answer in its])
        said.losses[one.name] = losses.mean_loss(
            model, tokens, tokenizer.pad_token_id, what, batch_size=how.batch_size
        )
    return said


def _found(
    columns: list[Column], sets: list[Set], said: list[Said], seed: int, target: Path | None
) -> Comparison:
    """Return the comparison of all that was said. target: where it will lie."""
    measured: list[Measure] = []
    rows: list[AnsweredQuestion] = []
    for one in sets:
        answered = [_answered(one, number, said) for number in range(len(one.questions))]
        measured += _measured(one, answered, said)
        rows += answered
    subjects = []
    for column in columns:
        run, adapter = column.subject.run, column.subject.adapter if column.tuned else None
        own = bool(adapter and run and target and target.absolute().parent == run.path)
        subjects.append(ComparedModel(label=column.label, adapter=adapter.name if adapter else None, own=own))
    return Comparison(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        subjects=subjects,
        measures=measured,
        answers=rows,
    )


def _answered(one: Set, number: int, said: list[Said]) -> AnsweredQuestion:
    question = one.questions[number]
    given = [column.answers[one.name][number].answer for column in said]
    check = one.checks[number] if one.checks else None
    right: list[bool | None]
    if check:
        right = [check.expect.met(answer) for answer in given]
    elif one.name == "repeated":
        right = [
            measures.holds(answer, question.reference) if question.reference else None for answer in given
        ]
    else:
        right = [measures.same(answer, question.reference) for answer in given]
    return AnsweredQuestion(
        set=one.name,
        kind=check.kind if check else None,
        question=question.messages[-1]["content"],
        reference=str(check.expect) if check else question.reference,
        answers=given,
        right=right,
    )


def _measured(one: Set, rows: list[AnsweredQuestion], said: list[Said]) -> Iterator[Measure]:
    """Yield the measures of a set, in the order in which they are shown."""

    def share(measure: str, of: list[AnsweredQuestion], truths: Iterable[Iterable[bool | None]]) -> Measure:
        sums = [sum(map(bool, column)) / len(of) for column in zip(*truths, strict=True)]
        return Measure(
            set=one.name, measure=measure, kind="share", better="higher", count=len(of), values=sums
        )

    def number(measure: str, better: Any, values: Iterable[float | None]) -> Measure:
        return Measure(
            set=one.name, measure=measure, kind="number", better=better, count=len(rows), values=list(values)
        )

    if one.name == "general":
        yield share("right", rows, (row.right for row in rows))
        for kind in dict.fromkeys(row.kind for row in rows):
            its = [row for row in rows if row.kind == kind]
            yield share(f"right: {kind}", its, (row.right for row in its))
        yield number("perplexity", "lower", (losses.perplexity(column.losses[one.name]) for column in said))
    elif one.name == "repeated":
        columns = zip(*(row.answers for row in rows), strict=True)
        yield number("different", "lower", (measures.different(texts) for texts in columns))
        if rows[0].reference:
            yield share("holds", rows, (row.right for row in rows))
            yield share(
                "exact", rows, ([measures.same(text, row.reference) for text in row.answers] for row in rows)
            )
    else:
        yield share("exact", rows, (row.right for row in rows))
        alike = zip(
            *([measures.similarity(text, row.reference) for text in row.answers] for row in rows), strict=True
        )
        yield number("similarity", "higher", (sum(column) / len(rows) for column in alike))
        yield number("loss", "lower", (column.losses[one.name] for column in said))


def _say_if_cut(tokenizer: Any, one: Set, how: How, console: Console) -> None:
    """Say so when references are longer than any answer may be."""
    texts = [question.reference for question in one.questions if question.reference]
    if one.name == "repeated" or not texts:
        return
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if longer := sum(len(each) > how.greedy.max_new_tokens for each in ids):
        _say(
            console,
            f"{longer} of {len(texts)} {TITLES[one.name]} have references longer than --max-new-tokens"
            f" {how.greedy.max_new_tokens}: answers to them are cut and cannot be exact",
        )


def _target(subjects: list[Subject], output: Path | None) -> Path | None:
    """Return where the comparison goes. Raises: ValueError when it cannot go where the user says."""
    if output is None:
        runs = [subject.run for subject in subjects if subject.run]
        return runs[-1].comparison if runs else None
    return free_file(output, "--output")


def _keep(found: Comparison, target: Path, *, asked_for: bool) -> None:
    try:
        write_atomically(target, found.text() + "\n")
    except OSError as error:
        if asked_for:
            raise ValueError(f"--output {target} cannot be written: {error.strerror}") from None
        print(
            f"warning: {target} cannot be written: {error.strerror}; --output FILE names another",
            file=sys.stderr,
        )


def _counts(found: Comparison, rows: list[AnsweredQuestion]) -> str:
    parts = []
    for number, subject in enumerate(found.subjects):
        right = sum(bool(row.right[number]) for row in rows)
        label = side_by_side.clean(subject.label).replace("\n", " ")
        parts.append(f"{label} {right} of {len(rows)} ({right / len(rows):.1%})")
    return ", ".join(parts)


def _say(console: Console, note: str) -> None:
    console.print(side_by_side.clean(note), markup=False, soft_wrap=True)
