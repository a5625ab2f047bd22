"""The numbers of a run over its steps, as metrics.jsonl has them; curves.py draws them."""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Series(NamedTuple):
    """A number over rising steps, both of shape (points,): int64 steps, float64 values (maybe non-finite)."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    @property
    def finite(self) -> "Series":
        """The points with finite values."""
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])

    @property
    def not_finite(self) -> npt.NDArray[np.int64]:
        """The steps with non-finite values."""
        return self.steps[~np.isfinite(self.values)]

    @property
    def lowest(self) -> tuple[int, float] | None:
        """The step and value of the lowest point; None without finite values."""
        steps, values = self.finite
        return (int(steps[values.argmin()]), float(values.min())) if len(values) else None


def read_curves(metrics: Path) -> dict[str, Series]:
    """Return {name: curve} of metrics.jsonl but for broken lines; of a step logged twice the later counts."""
    values: defaultdict[str, dict[int, float]] = defaultdict(dict)
    if metrics.exists():
        with metrics.open("rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    step = int(entry.pop("step"))
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue
                for name, value in entry.items():
                    if isinstance(value, int | float) and abs(step) < 2**53:
                        values[name][step] = float(value)
    return {name: _series(by_step) for name, by_step in values.items()}


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    return Series(np.array(steps, np.int64), np.array([values[step] for step in steps], np.float64))
