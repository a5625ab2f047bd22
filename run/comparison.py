"""What comparison.json holds: compare.py writes it into the run folder, report.py shows it."""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError, model_validator


class Subject(BaseModel):
    """One that was asked. adapter: its folder's name; own: that folder is of the run in which comparison.json
    lies."""

    label: str
    adapter: str | None = None
    own: bool = False


class Measure(BaseModel):
    """A number of each subject, in the subjects' order. count: of how many questions."""

    set: str
    measure: str
    kind: Literal["share", "number"]
    better: Literal["higher", "lower"]
    count: int | None = None
    values: list[float | None]

    @property
    def best(self) -> float | None:
        """The best value, where there are different ones."""
        known = {value for value in self.values if value is not None and math.isfinite(value)}
        if len(known) < 2:
            return None
        return max(known) if self.better == "higher" else min(known)


class Answered(BaseModel):
    """A question, what each subject answered, and whether that was right, where it can be told."""

    set: str
    kind: str | None = None
    question: str
    reference: str = ""
    answers: list[str]
    right: list[bool | None]


class Comparison(BaseModel):
    """The whole file. made: ISO time."""

    made: str = ""
    seed: int | None = None
    subjects: list[Subject]
    measures: list[Measure]
    answers: list[Answered]

    @model_validator(mode="after")
    def _one_for_each_subject(self) -> "Comparison":
        lengths = {len(measure.values) for measure in self.measures}
        lengths |= {len(row) for one in self.answers for row in (one.answers, one.right)}
        if lengths - {len(self.subjects)}:
            raise ValueError(f"there are {len(self.subjects)} subjects, but rows of {sorted(lengths)} values")
        return self

    @property
    def measured(self) -> dict[str, list[Measure]]:
        """The measures by set."""
        names = dict.fromkeys(one.set for one in self.measures)
        return {name: [one for one in self.measures if one.set == name] for name in names}

    @property
    def sets(self) -> dict[str, list[Answered]]:
        """The answers by set."""
        names = dict.fromkeys(one.set for one in self.answers)
        return {name: [one for one in self.answers if one.set == name] for name in names}


def read(file: Path) -> Comparison | None:
    """Return what was compared; None without the file. Raises: ValueError when it is damaged."""
    try:
        return Comparison.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
