"""General questions (general.jsonl, or a user's file: docs/compare.md), with checks that need no judge."""

import re
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from qwenlora.adapter.answers import check_text
from qwenlora.configs.schema import Section, Text
from qwenlora.data.bad_row import BadRow, printable, show
from qwenlora.data.json_rows import decode_json

Texts = Annotated[list[Text], Field(min_length=1)]


class Expectation(Section):
    """Conditions of a right answer; all given ones must hold. Case and kind of apostrophe do not matter."""

    any_of: Texts | None = Field(None, description="The answer has one of these, or more.")
    all_of: Texts | None = Field(None, description="It has all of these.")
    none_of: Texts | None = Field(None, description="It has none of these.")
    pattern: Text | None = Field(None, description="This regular expression (Python's re) is found in it.")
    number: int | None = Field(None, description="This number stands in it: 7 is neither in 17 nor in 7.5.")
    max_chars: PositiveInt | None = Field(None, description="It is no longer than this, in characters.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _has_a_condition(self) -> "Expectation":
        if not self.model_fields_set:
            raise ValueError(
                f"empty, so that any answer would be right; name one of {', '.join(Expectation.model_fields)}"
            )
        return self

    def is_met(self, answer: str) -> bool:
        """Whether an answer is right."""
        text = _folded(answer)
        conditions = (
            self.any_of is None or _count(self.any_of, text) > 0,
            self.all_of is None or _count(self.all_of, text) == len(self.all_of),
            self.none_of is None or _count(self.none_of, text) == 0,
            self.pattern is None or re.search(self.pattern, _straight(answer), re.IGNORECASE) is not None,
            self.number is None or self.number in _numbers(text),
            self.max_chars is None or len(answer.strip()) <= self.max_chars,
        )
        return all(conditions)

    def __str__(self) -> str:
        lists = {"one of": self.any_of, "all of": self.all_of, "none of": self.none_of}
        parts = [f"{what} {_first_three(texts)}" for what, texts in lists.items() if texts]
        parts += [f"pattern {self.pattern}"] if self.pattern else []
        parts += [f"the number {self.number}"] if self.number is not None else []
        parts += [f"at most {self.max_chars} characters"] if self.max_chars else []
        return "; ".join(parts)


class GeneralQuestion(Section):
    """A line of the file. kind, language: any words; results are counted by kind."""

    id: Text
    kind: Text
    language: Text
    question: Text
    expect: Expectation

    @field_validator("question")
    @classmethod
    def _can_be_sent(cls, question: str) -> str:
        check_text(question, "it")
        return question


def read_general_questions(file: Path | None) -> list[GeneralQuestion]:
    """Return a file's questions; None: qwenlora's own. Raises: ValueError naming the first bad line."""
    path = file or Path(str(resources.files("qwenlora.adapter.compare") / "general.jsonl"))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"--general {path}: {reason}; expected JSON lines, see docs/compare.md") from None
    questions: dict[str, GeneralQuestion] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = GeneralQuestion.model_validate(decode_json(line))
        except BadRow as error:
            raise ValueError(f"--general {path}:{number}: {error}") from None
        except ValidationError as error:
            raise ValueError(f"--general {path}:{number}: {_problem(error)}") from None
        if question.id in questions:
            raise ValueError(
                f"--general {path}:{number}: id {show(question.id)} is an earlier line's; give it another"
            )
        questions[question.id] = question
    if not questions:
        raise ValueError(f"--general {path} has no questions; expected one a line, see docs/compare.md")
    return list(questions.values())


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = Expectation.model_fields if key.startswith("expect.") else GeneralQuestion.model_fields
        return printable(f"unknown key {key}; known: {', '.join(known)}")
    if first["type"] == "missing":
        return f"{key} is missing; a line has {', '.join(GeneralQuestion.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = "must be an object"
    problem = printable(f"{key or 'the line'}: {message[0].lower()}{message[1:]}")
    return f"{problem}, found {show(first['input'])}"


def _straight(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


def _folded(text: str) -> str:
    return _straight(text).casefold()


def _count(parts: list[str], text: str) -> int:
    """Return how many of the parts a folded text contains."""
    return sum(_folded(part) in text for part in parts)


def _numbers(text: str) -> set[int]:
    """Return the whole numbers of a text: 1,000 is a thousand, 7.0 is 7, 3.5 is not a whole number."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.0+)?(?![\d]|\.\d)", text)
    return {int(number.partition(".")[0]) for number in numbers}


def _first_three(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (" ..." if len(texts) > 3 else "")
