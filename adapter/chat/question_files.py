"""The questions of a file, answered in batches: `qwenlora chat runs/tiny --input asked.jsonl --output
said.jsonl`.

A line of the output is a row that could be trained: {"messages": [..., the answer], "reference": what the row
had}, and "cut": true when the answer was not at its end (--max-new-tokens, or the model's context).
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenlora.adapter.answers import Answer, Question, Sampling, answers, check_text, prompt_of
from qwenlora.adapter.outputs import free_file
from qwenlora.configs.schema import Data
from qwenlora.data import sources
from qwenlora.data.bad_row import BadRow
from qwenlora.data.rows import to_row
from qwenlora.data.shapes import PAIRS, TURN_LISTS, RowOptions, shape_of
from qwenlora.data.sources import Source
from qwenlora.data.tokenise import chunks_with_shape
from qwenlora.data.turns import Message

SHOWN = 10  # rows that cannot be asked
_REPLY = "(the answer)"  # stands in for a reply in rows that have none
_C1 = re.compile("[\x7f-\x9f]")  # JSON may hold them as they are; some terminals obey them


def read(file: Path, data: Data, system: str | None = None) -> list[Question]:
    """Return the questions of a file: rows as for training, with or without a last reply; of .txt a question
    a line.

    data: how rows are read (columns, roles, format, encoding). system: for those that have no system prompt.
    Raises: ValueError naming the file and the rows that cannot be asked.
    """
    if not file.is_file():
        raise ValueError(f"--input {file}: no such file (looked for {file.absolute()})")
    found = list(_lines(file) if file.suffix.lower() == ".txt" else _rows(file, data))
    if not found:
        raise ValueError(f"--input {file} is empty: it has no questions")
    if bad := [f"{place}: {question}" for place, question in found if isinstance(question, BadRow)]:
        more = [f"and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
        shown = "\n  ".join([*bad[:SHOWN], *more])
        raise ValueError(f"--input {file}: {len(bad):,} of {len(found):,} rows cannot be asked:\n  {shown}")
    asked = [question for _, question in found if isinstance(question, Question)]
    if not system:
        return asked
    first = Message(role="system", content=system)
    return [
        one if one.messages[0]["role"] == "system" else one._replace(messages=[first, *one.messages])
        for one in asked
    ]


def _lines(file: Path) -> Iterator[tuple[str, Question | BadRow]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--input {file} is not UTF-8 text at byte {error.start:,}; convert it: iconv"
        ) from None
    for number, line in enumerate(text.split("\n"), 1):
        if said := line.strip():
            try:
                check_text(said, "the question")
                yield f"{file}:{number}", Question([Message(role="user", content=said)])
            except ValueError as error:
                yield f"{file}:{number}", BadRow(str(error))


def _rows(file: Path, data: Data) -> Iterator[tuple[str, Question | BadRow]]:
    alone = data.model_copy(update={"train": str(file.absolute()), "eval": None, "eval_fraction": None})
    for source in sources.find(alone):
        for number, chunk, shape in chunks_with_shape(source):
            for line, value in chunk.values():
                yield _place(source, number, line), _question(line, value, shape, source.options)


def _place(source: Source, file: int, line: int) -> str:
    return f"{source.files[file].name}:{line}"


def _question(line: int, value: Any, shape: str | None, options: RowOptions) -> Question | BadRow:
    if isinstance(value, BadRow):
        return value
    try:
        value = _with_a_reply(value, options)
        row = to_row(line, value, shape or shape_of(value, options), options)
    except BadRow as error:
        return error
    messages, reference = row.messages, ""
    if messages and messages[-1]["content"] == _REPLY:
        messages = messages[:-1]
    if messages and messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1]["content"]
    if not any(message["role"] == "user" for message in messages):
        return BadRow("asks nothing; expected a user's turn before the reply")
    return Question(messages, reference, row.tools)


def _with_a_reply(value: Any, options: RowOptions) -> Any:
    """Return a row with one reply more, so that one that only asks is read as those that are trained."""
    if not isinstance(value, dict):
        return value
    theirs = {options.columns.get(key, key): key for key in value}
    for key in TURN_LISTS:
        turns = value.get(theirs.get(key, ""))
        if isinstance(turns, list) and turns:
            return value | {theirs[key]: [*turns, {"role": "assistant", "content": _REPLY}]}
    for asked, answered in PAIRS.values():
        if asked in theirs and value.get(theirs.get(answered, "")) in (None, ""):
            return value | {theirs.get(answered, answered): _REPLY}
    return value


def check_lengths(asked: list[Question], tokenizer: Any, limit: int, *, thinking: bool) -> None:
    """Refuse questions that leave no room for an answer. limit: the model's context, in tokens. Raises:
    ValueError."""
    for number, question in enumerate(asked, 1):
        text = prompt_of(tokenizer, question, thinking=thinking)
        if (length := len(tokenizer(text, add_special_tokens=False)["input_ids"])) >= limit:
            raise ValueError(
                f"--input: question {number:,} has {length:,} tokens, the model takes {limit:,}; shorten it"
            )


def check_output(target: Path) -> None:
    """Raise ValueError when answers cannot go there."""
    free_file(target, "--output")
    free_file(_partial(target), "--output: the answers of an earlier try:")


def answer(
    model: Any,
    tokenizer: Any,
    asked: list[Question],
    sampling: Sampling,
    target: Path | None,
    *,
    thinking: bool,
) -> None:
    """Write a line of JSON for each question, in order: to target, or to standard output."""
    said = answers(model, tokenizer, asked, sampling, "answering", thinking=thinking)
    lines = (_line(question, answer) for question, answer in zip(asked, said, strict=True))
    if target is None:
        # on a screen the progress bar and the lines would be in each other's way
        for line in list(lines) if sys.stdout.isatty() else lines:
            print(line, flush=True)
        return
    _write(target, lines, len(asked))


def _line(question: Question, answer: Answer) -> str:
    reply = Message(role="assistant", content=answer.answer)
    if answer.thought:
        reply["reasoning_content"] = answer.thought
    row: dict[str, Any] = {"messages": [*question.messages, reply]}
    row |= {"tools": question.tools} if question.tools else {}
    row |= {"reference": question.reference} if question.reference else {}
    row |= {"cut": True} if answer.cut else {}
    return _C1.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(row, ensure_ascii=False))


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _write(target: Path, lines: Iterable[str], count: int) -> None:
    """Write a file that has its name once it is whole; what was answered before a failure stays beside it."""
    partial, written = _partial(target), 0
    try:
        with partial.open("x", encoding="utf-8") as file:
            for line in lines:
                file.write(f"{line}\n")
                file.flush()
                written += 1
            os.fsync(file.fileno())
        partial.rename(target)
    except OSError as error:
        raise ValueError(f"--output {target} cannot be written: {error.strerror}") from None
    finally:
        if written < count:
            if written:
                print(f"{written:,} of {count:,} answers are in {partial}", file=sys.stderr)
            else:
                partial.unlink(missing_ok=True)
