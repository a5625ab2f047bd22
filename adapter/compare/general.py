"""General questions, with checks that need no judge: does a tuned model still greet, define, calculate,
decline?

`read(None)` gives the 60 that come with qwenlora (general.jsonl), `read(path)` a file of the user's own, in
the same
format: docs/compare.md.
"""

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


class Expect(Section):
    """What a right answer has; all that is named must hold. Case does not matter, nor which apostrophe is
    used."""

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
    def _says_something(self) -> "Expect":
        if not self.model_fields_set:
            raise ValueError(
                f"empty, so that any answer would be right; name one of {', '.join(Expect.model_fields)}"
            )
        return self

    def met(self, answer: str) -> bool:
        """Whether an answer is right."""
        text = _folded(answer)
        return (
            (self.any_of is None or any(_folded(part) in text for part in self.any_of))
            and all(_folded(part) in text for part in self.all_of or ())
            and not any(_folded(part) in text for part in self.none_of or ())
            and (self.pattern is None or bool(re.search(self.pattern, _straight(answer), re.IGNORECASE)))
            and (self.number is None or self.number in _numbers(text))
            and (self.max_chars is None or len(answer.strip()) <= self.max_chars)
        )

    def __str__(self) -> str:
        lists = {"one of": self.any_of, "all of": self.all_of, "none of": self.none_of}
        parts = [f"{what} {_few(texts)}" for what, texts in lists.items() if texts]
        parts += [f"pattern {self.pattern}"] if self.pattern else []
        parts += [f"the number {self.number}"] if self.number is not None else []
        parts += [f"at most {self.max_chars} characters"] if self.max_chars else []
        return "; ".join(parts)


class General(Section):
    """One question. kind, language: words of the file's own; results are counted by kind."""

    id: Text
    kind: Text
    language: Text
    question: Text
    expect: Expect

    @field_validator("question")
    @classmethod
    def _can_be_asked(cls, question: str) -> str:
        check_text(question, "it")
        return question


def read(file: Path | None) -> list[General]:
    """Return a file's questions; None: those that come with qwenlora. Raises: ValueError naming the first bad
    line."""
    path = file or Path(str(resources.files("qwenlora.adapter.compare") / "general.jsonl"))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"--general {path}: {reason}; expected JSON lines, see docs/compare.md") from None
    found: dict[str, General] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = General.model_validate(decode_json(line))
        except BadRow as error:
            raise ValueError(f"--general {path}:{number}: {error}") from None
        except ValidationError as error:
            raise ValueError(f"--general {path}:{number}: {_problem(error)}") from None
        if question.id in found:
            raise ValueError(
                f"--general {path}:{number}: id {show(question.id)} is an earlier line's; give it another"
            )
        found[question.id] = question
    if not found:
        raise ValueError(f"--general {path} has no questions; expected one a line, see docs/compare.md")
    return list(found.values())


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = Expect.model_fields if key.startswith("expect.") else General.model_fields
        return printable(f"unknown key {key}; known: {', '.join(known)}")
    if first["type"] == "missing":
        return f"{key} is missing; a line has {', '.join(General.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = "must be an object"
    return (
        printable(f"{key or 'the line'}: {message[0].lower()}{message[1:]}")
        + f", found {show(first['input'])}"
    )


def _straight(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


def _folded(text: str) -> str:
    return _straight(text).casefold()


def _numbers(text: str) -> set[int]:
    """Return the whole numbers of a text: 1,000 is one, 3.5 is none, 7.0 is 7."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    found = re.findall(r"(?<![\d.])-?\d+(?:\.0+)?(?![\d]|\.\d)", text)
    return {int(number.partition(".")[0]) for number in found}


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (" ..." if len(texts) > 3 else "")
