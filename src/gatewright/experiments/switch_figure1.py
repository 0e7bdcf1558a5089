"""switch/figure1: 1, 2, 4, ... 64 experts at equal FLOPs per token, by step and by time, with a power law in
total parameters that predicts the largest from the others.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gatewright.experiments.arms import run_arms
from gatewright.experiments.compare import crossing
from gatewright.experiments.granularity import bits, gaps
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.paired import finite, interval
from gatewright.experiments.switch_table1 import DENSE_RATE, SWITCH_RATE
from gatewright.experiments.t_test import quantile
from gatewright.parts import Capacity

_WIDTH = 256
COUNTS = (1, 2, 4, 8, 16, 32, 64)
# By how much of the measured bits per byte the prediction may be off.
MARGIN = 0.01


def named(num_experts: int) -> str:
    """Return the name of an arm."""
    return f"{num_experts} experts" if num_experts > 1 else "1 expert"


def _arm(num_experts: int) -> Arm:
    """Return Switch; one expert is the dense twin. Evaluated without drops (f = E)."""
    if num_experts == 1:
        return Arm(named(1), None, 1, 1, _WIDTH, note="the dense twin", learning_rate=DENSE_RATE)
    capacity = Capacity(1.25, float(num_experts), per_token=True)
    return Arm(
        named(num_experts),
        "switch",
        num_experts,
        1,
        _WIDTH,
        {"balance": 1e-2},
        capacity=capacity,
        learning_rate=SWITCH_RATE,
    )


PLAN = Plan(
    arms=tuple(map(_arm, COUNTS)),
    baseline=named(1),
    steps=1024,
    eval_bytes=65_536,
    evaluations=12,
    padded=True,
)
CLAIM = (
    "at equal FLOPs of the experts per token more of them end lower, on average over seeds at each doubling, "
    "and a power law in total parameters fitted to 1 to 32 experts predicts 64 within 1 %"
)


class Law(NamedTuple):
    """ln L = ln a - b ln N by least squares, its residual SD, and what an interval of it needs."""

    a: float
    b: float
    deviation: float
    middle: float
    squares: float
    points: int

    def at(self, parameters: float, chance: float = 0.95) -> tuple[float, float, float]:
        """Return the prediction for N parameters, and its two-sided prediction interval."""
        x = math.log(parameters)
        line = math.log(self.a) - self.b * x
        width = math.sqrt(1 + 1 / self.points + (x - self.middle) ** 2 / self.squares)
        reach = quantile(self.points - 2, (1 - chance) / 2) * self.deviation * width
        return math.exp(line), math.exp(line - reach), math.exp(line + reach)


def fit(parameters: Sequence[float], losses: Sequence[float]) -> Law:
    """Return the power law L = a N^-b through three points or more, by least squares in logarithms."""
    x, y = [math.log(n) for n in parameters], [math.log(value) for value in losses]
    slope, start = statistics.linear_regression(x, y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    middle = statistics.fmean(x)
    squares = sum((a - middle) ** 2 for a in x)
    return Law(math.exp(start), -slope, math.sqrt(left / (len(x) - 2)), middle, squares, len(x))


def run_switch_figure1(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    title = "Experts at equal FLOPs per token (Switch, figure 1)"
    return run_arms(PLAN, work, quick, "switch/figure1", title, CLAIM, figure1_verdict)


def figure1_verdict(record: Record) -> Record:
    """Return whether every doubling helps, and the last one by as much as the others predict."""
    names = list(map(named, COUNTS))
    means = [statistics.fmean(bits(record, name)) for name in names]
    if not all(map(math.isfinite, means)):
        lost = [name for name, mean in zip(names, means, strict=True) if not math.isfinite(mean)]
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged"}
    sizes = [record["arms"][name]["cost"]["total_parameters"] for name in names]
    law = fit(sizes[:-1], means[:-1])
    predicted, low, high = law.at(sizes[-1])
    off = means[-1] / predicted - 1
    falls = [two - one for one, two in itertools.pairwise(means)]
    held = max(falls) < 0 and abs(off) <= MARGIN
    word = "held" if held else "did not hold"
    return {
        "held": held,
        "law": {"a": law.a, "b": law.b, "residual_sd": law.deviation},
        "predicted": predicted,
        "prediction_interval": [low, high],
        "measured": means[-1],
        "changes_bpb": falls,
        "gaps_bpb": {name: list(map(finite, gaps(record, named(1), name))) for name in names[1:]},
        "table": _table(record, law),
        "sentence": f"{word}: each doubling changes the mean by {', '.join(f'{v:+.4f}' for v in falls)} bits "
        f"per byte; {law.a:.3g} N^{-law.b:.4f} from 1 to 32 experts predicts {predicted:.4f} for 64 (95 % "
        f"from {low:.4f} to {high:.4f}), measured {means[-1]:.4f}, {100 * off:+.2f} %; 64 experts end "
        f"{interval(gaps(record, named(1), named(64)))} below the dense twin",
    }


def _table(record: Record, law: Law) -> list[str]:
    """Return a row per number of experts: size, law, and steps and time to the dense twin's quality."""
    lines = [
        "By step and by time: steps to the dense twin's final bits per byte of the same seed (- if never), "
        "and the dense steps' time they take, kept rows only and with all E C places computed. Law: a N^-b, "
        "fitted to all but the largest.",
        "",
        "| experts | parameters | bits per byte, mean | law | below the dense twin | steps to its quality | "
        "time | time, padded |",
        "|--:|--:|--:|--:|---|---|---|---|",
    ]
    targets = bits(record, named(1))
    for count in COUNTS:
        arm = record["arms"][named(count)]
        size = arm["cost"]["total_parameters"]
        found = [
            crossing(own["path"], target, "step") for own, target in zip(arm["seeds"], targets, strict=True)
        ]
        cells = [_told(found, 1.0)]
        cells += [_told(found, arm[form]["median"]) for form in ("step_time", "padded_step_time")]
        mean, below = statistics.fmean(bits(record, named(count))), gaps(record, named(1), named(count))
        lines.append(
            f"| {count} | {size:,} | {mean:.4f} | {law.at(size)[0]:.4f} | {interval(below)} "
            f"| {' | '.join(cells)} |"
        )
    return [*lines, ""]


def _told(steps: Sequence[float | None], ratio: float) -> str:
    return ", ".join("-" if step is None else f"{step * ratio:.0f}" for step in steps)
