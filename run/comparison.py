"""comparison.json, which `qwenlora compare` writes into the run folder, and reports and model cards show."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from qwenlora.run.records import Record


class ComparedModel(BaseModel, frozen=True):
    """A compared model. adapter: its folder's name, None for a base; own: the folder is this run's."""

    label: str
    adapter: str | None = None
    own: bool = False


class Measure(BaseModel, frozen=True):
    """A number of each model, in the models' order. count: the number of questions."""

    set: str
    measure: str
    kind: Literal["share", "number"]
    better: Literal["higher", "lower"]
    count: int | None = None
    values: list[float | None]

    @property
    def best(self) -> float | None:
        """The best value; None where all are equal."""
        known = {value for value in self.values if value is not None and math.isfinite(value)}
        if len(known) < 2:
            return None
        return max(known) if self.better == "higher" else min(known)


class AnsweredQuestion(BaseModel, frozen=True):
    """A question, and each model's answer. right: None where that cannot be judged."""

    set: str
    kind: str | None = None
    question: str
    reference: str = ""
    answers: list[str]
    right: list[bool | None]


class Comparison(Record):
    """The whole file. made: ISO time; subjects: the compared models."""

    model_config = ConfigDict(ser_json_inf_nan="null")

    made: str = ""
    seed: int | None = None
    subjects: list[ComparedModel]
    measures: list[Measure]
    answers: list[AnsweredQuestion]

    @model_validator(mode="after")
    def _one_for_each_model(self) -> "Comparison":
        lengths = {len(measure.values) for measure in self.measures}
        lengths |= {len(values) for row in self.answers for values in (row.answers, row.right)}
        if lengths - {len(self.subjects)}:
            raise ValueError(f"there are {len(self.subjects)} subjects, but rows of {sorted(lengths)} values")
        return self

    @property
    def measures_by_set(self) -> dict[str, list[Measure]]:
        """{set: its measures}."""
        names = dict.fromkeys(measure.set for measure in self.measures)
        return {name: [measure for measure in self.measures if measure.set == name] for name in names}

    @property
    def answers_by_set(self) -> dict[str, list[AnsweredQuestion]]:
        """{set: its questions and answers}."""
        names = dict.fromkeys(row.set for row in self.answers)
        return {name: [row for row in self.answers if row.set == name] for name in names}
