"""Differences of two arms seed by seed, with an interval for their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from gatewright.experiments.t_test import quantile


class Paired(NamedTuple):
    """The mean of paired differences, and its two-sided interval of Student's t."""

    mean: float
    low: float
    high: float


def paired(differences: Sequence[float], chance: float = 0.95) -> Paired | None:
    """Return the mean difference with its interval; None below two values, or where one is not finite."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    reach = quantile(len(differences) - 1, (1 - chance) / 2) * spread / math.sqrt(len(differences))
    return Paired(mean, mean - reach, mean + reach)


def interval(differences: Sequence[float], digits: int = 4) -> str:
    """Return "mean +0.0123 (95 % from +0.0010 to +0.0236)", or the values where there is no interval."""
    found = paired(differences)
    if found is None:
        return ", ".join(f"{value:+.{digits}f}" for value in differences)
    mean, low, high = (f"{value:+.{digits}f}" for value in found)
    return f"mean {mean} (95 % from {low} to {high})"


def finite(value: float) -> float | None:
    """Return a number as a record can hold it: None for what is not finite."""
    return value if math.isfinite(value) else None
