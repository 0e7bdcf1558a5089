"""Rounds in which every side has its turn, and the figures that come of them: paired ratios, their range."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from gatewright.errors import UserError

FEWEST_ROUNDS = 11
Clock = Callable[[], float]


class Turn(NamedTuple):
    """What one side does in a round: `call` is timed, `clear` (which frees its gradients) is not."""

    call: Callable[[], None]
    clear: Callable[[], None]


class Middle(NamedTuple):
    """A median with the 10th and the 90th percentile beside it."""

    median: float
    low: float
    high: float


def check_rounds(rounds: int) -> None:
    """Raise UserError for fewer rounds than say something on a shared machine."""
    if rounds < FEWEST_ROUNDS:
        raise UserError(
            f"rounds {rounds}; allowed: {FEWEST_ROUNDS} or more; fewer say nothing on a shared machine"
        )


def orders(count: int) -> list[list[int]]:
    """Return the orders that rounds go through: each side stands in each place, and behind each other side,
    equally often (Williams' design: `count` orders, twice as many for an odd count).
    """
    first = [0] + [((place + 1) // 2) if place % 2 else count - place // 2 for place in range(1, count)]
    square = [[(side + shift) % count for side in first] for shift in range(count)]
    return square + [row[::-1] for row in square] if count % 2 and count > 1 else square


def time_rounds(
    sides: Mapping[str, Turn], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return each side's seconds, one per round, in the order of the rounds; no garbage is collected
    meanwhile.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    designs = orders(len(names))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for place in designs[turn % len(designs)]:
                call, clear = sides[names[place]]
                started = clock()
                call()
                seconds[names[place]].append(clock() - started)
                clear()
    finally:
        if collecting:
            gc.enable()
    return seconds


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which `share` of them lie; a value that was measured, none in between."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def middle(values: Sequence[float]) -> Middle:
    """Return median, 10th and 90th percentile."""
    return Middle(statistics.median(values), percentile(values, 0.1), percentile(values, 0.9))


def spread(values: Sequence[float]) -> float:
    """Return (90th - 10th percentile) / median."""
    found = middle(values)
    return (found.high - found.low) / found.median


def best_of_rounds(seconds: Mapping[str, Sequence[float]], names: Iterable[str]) -> list[float]:
    """Return the fastest of the named sides in each round."""
    return [min(turn) for turn in zip(*(seconds[name] for name in names), strict=True)]


def paired(over: Sequence[float], under: Sequence[float]) -> Middle:
    """Return the median of the ratios of one round's two times, with its range; never a ratio of medians."""
    return middle([a / b for a, b in zip(over, under, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean: ratios multiply."""
    return math.exp(statistics.fmean(map(math.log, values)))
