"""The questions of a file, answered in batches: `qwenlora chat RUN --input FILE --output ANSWERS`.

A line of the output is a row that could be trained: {"messages": [..., the answer], "reference": the row's
own reply}, and "cut": true when the answer did not end by itself (--max-new-tokens, or the model's context).
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenlora.adapter.answers import Answer, Question, Sampling, check_text, generate_answers, prompt_of
from qwenlora.adapter.outputs import free_file
from qwenlora.configs.schema import Data
from qwenlora.data import sources
from qwenlora.data.bad_row import BadRow, or_bad
from qwenlora.data.rows import to_row
from qwenlora.data.shapes import PAIRS, TURN_LISTS, RowOptions
from qwenlora.data.sources import Source
from qwenlora.data.tokenise import chunks_with_shape
from qwenlora.data.turns import Message

SHOWN = 10  # bad rows in a message
_REPLY = "(the answer)"  # stands in for a reply in rows that have none
_C1 = re.compile("[\x7f-\x9f]")  # control characters that JSON need not escape; some terminals obey them


def read_questions(file: Path, data: Data, system: str | None = None) -> list[Question]:
    """Return a file's questions: rows as for training, with or without a last reply; or the lines of a .txt.

    data: how rows are read; system: for rows without a system prompt. Raises: ValueError naming the bad rows.
    """
    if not file.is_file():
        raise ValueError(f"--input {file}: no such file (looked for {file.absolute()})")
    rows = list(_lines(file) if file.suffix.lower() == ".txt" else _rows(file, data))
    if not rows:
        raise ValueError(f"--input {file} is empty: it has no questions")
    if bad := [f"{place}: {question}" for place, question in rows if isinstance(question, BadRow)]:
        more = [f"and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
        shown = "\n  ".join([*bad[:SHOWN], *more])
        raise ValueError(f"--input {file}: {len(bad):,} of {len(rows):,} rows cannot be asked:\n  {shown}")
    questions = [question for _, question in rows if isinstance(question, Question)]
    return [_with_system(question, system) for question in questions] if system else questions


def _with_system(question: Question, system: str) -> Question:
    if question.messages[0]["role"] == "system":
        return question
    return question._replace(messages=[Message(role="system", content=system), *question.messages])


def _lines(file: Path) -> Iterator[tuple[str, Question | BadRow]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--input {file} is not UTF-8 text at byte {error.start:,}; convert it: iconv"
        ) from None
    for number, line in enumerate(text.split("\n"), 1):
        if question := line.strip():
            try:
                check_text(question, "the question")
                yield f"{file}:{number}", Question.from_text(question)
            except ValueError as error:
                yield f"{file}:{number}", BadRow(str(error))


def _rows(file: Path, data: Data) -> Iterator[tuple[str, Question | BadRow]]:
    only_this = data.model_copy(update={"train": str(file.absolute()), "eval": None, "eval_fraction": None})
    for source in sources.find(only_this):
        for number, chunk, shape in chunks_with_shape(source):
            for line, value in chunk.values():
                yield _place(source, number, line), _question(line, value, shape, source.options)


def _place(source: Source, file: int, line: int) -> str:
    return f"{source.files[file].name}:{line}"


def _question(line: int, value: Any, shape: str | None, options: RowOptions) -> Question | BadRow:
    row = or_bad(to_row, line, _with_reply(value, options), shape, options)
    if isinstance(row, BadRow):
        return row
    messages, reference = row.messages, ""
    if messages and messages[-1]["content"] == _REPLY:
        messages = messages[:-1]
    if messages and messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1]["content"]
    if not any(message["role"] == "user" for message in messages):
        return BadRow("asks nothing; expected a user's turn before the reply")
    return Question(messages, reference, row.tools)


def _with_reply(value: Any, options: RowOptions) -> Any:
    """Return a row with a reply added, so that a row without a reply is read like a training row."""
    if not isinstance(value, dict):
        return value
    names = {options.columns.get(name, name): name for name in value}  # {qwenlora's key: the row's}
    for key in TURN_LISTS:
        turns = value.get(names.get(key, ""))
        if isinstance(turns, list) and turns:
            return value | {names[key]: [*turns, {"role": "assistant", "content": _REPLY}]}
    for question, reply in PAIRS.values():
        if question in names and value.get(names.get(reply, "")) in (None, ""):
            return value | {names.get(reply, reply): _REPLY}
    return value


def check_lengths(questions: list[Question], tokenizer: Any, limit: int, *, thinking: bool | None) -> None:
    """Raise ValueError for a question that leaves no room for an answer. limit: the context, in tokens."""
    for number, question in enumerate(questions, 1):
        prompt = prompt_of(tokenizer, question, thinking=thinking)
        if (length := len(tokenizer(prompt, add_special_tokens=False)["input_ids"])) >= limit:
            raise ValueError(
                f"--input: question {number:,} has {length:,} tokens, the model takes {limit:,}; shorten it"
            )


def check_output(target: Path) -> None:
    """Raise ValueError when answers cannot be written there."""
    free_file(target, "--output")
    free_file(_partial(target), "--output: the answers of an earlier try:")


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    sampling: Sampling,
    target: Path | None,
    *,
    thinking: bool | None,
) -> None:
    """Write a line of JSON for each question, in order: to target, or to standard output."""
    answers = generate_answers(model, tokenizer, questions, sampling, "answering", thinking=thinking)
    lines = (_json_line(*pair) for pair in zip(questions, answers, strict=True))
    if target is not None:
        _write_lines(target, lines, len(questions))
        return
    # on a screen, lines would be mixed with the progress bar
    for line in list(lines) if sys.stdout.isatty() else lines:
        print(line, flush=True)


def _json_line(question: Question, answer: Answer) -> str:
    reply = Message(role="assistant", content=answer.answer)
    if answer.thought:
        reply["reasoning_content"] = answer.thought
    row: dict[str, object] = {"messages": [*question.messages, reply]}
    row |= {"tools": question.tools} if question.tools else {}
    row |= {"reference": question.reference} if question.reference else {}
    row |= {"cut": True} if answer.cut else {}
    return _C1.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(row, ensure_ascii=False))


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _write_lines(target: Path, lines: Iterable[str], count: int) -> None:
    """Write a file that gets its name once complete; after a failure the answers so far stay beside it."""
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
