"""Student's t for two samples with pooled variance, as the papers of the time report it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class TTest(NamedTuple):
    """`t` is positive where the second mean is the larger; `p` is the chance of a t that large or larger."""

    t: float
    degrees: int
    p: float


def t_test(one: Sequence[float], two: Sequence[float]) -> TTest | None:
    """Return the one-sided test that the mean of `two` exceeds that of `one`; None below two values of each
    or without any spread.
    """
    if min(len(one), len(two)) < 2:
        return None
    degrees = len(one) + len(two) - 2
    within = (len(one) - 1) * statistics.variance(one) + (len(two) - 1) * statistics.variance(two)
    if within == 0:
        return None
    spread = math.sqrt(within / degrees * (1 / len(one) + 1 / len(two)))
    t = (statistics.fmean(two) - statistics.fmean(one)) / spread
    return TTest(t, degrees, upper_tail(t, degrees))


def upper_tail(t: float, degrees: int) -> float:
    """Return P(T > t) of Student's distribution; below about 1e-15 it is 0.

    Equation: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4; theta = atan(t / sqrt(degrees)).
    """
    theta = math.atan2(abs(t), math.sqrt(degrees))
    cos_squared = math.cos(theta) ** 2
    odd = degrees % 2 == 1
    term, total = (math.cos(theta), 0.0) if odd else (1.0, 0.0)
    for k in range(degrees // 2):
        total += term
        term *= cos_squared * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    tail = max(0.0, (1 - inside) / 2)
    return tail if t >= 0 else 1 - tail


class Paired(NamedTuple):
    """The mean of paired differences, and its interval at 95 %: None with a single pair."""

    mean: float
    low: float | None
    high: float | None

    def told(self, unit: str = "") -> str:
        """Return it as "+0.50 (-0.10 to +1.10)"."""
        inside = "" if self.low is None else f" ({self.low:+.2f} to {self.high:+.2f})"
        return f"{self.mean:+.2f}{unit}{inside}"


def paired(differences: Sequence[float]) -> Paired:
    """Return mean and interval of differences that come in pairs: mean -+ t s / sqrt(n), t of n - 1 degrees
    with 2.5 % beyond.
    """
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Paired(mean, None, None)
    half = quantile(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Paired(mean, mean - half, mean + half)


def quantile(degrees: int, beyond: float = 0.025) -> float:
    """Return the t that Student's distribution exceeds with this chance, by halving an interval."""
    low, high = 0.0, 1.0
    while upper_tail(high, degrees) > beyond:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, degrees) > beyond else (low, middle)
    return (low + high) / 2
