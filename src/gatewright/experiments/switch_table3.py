"""switch/table3: weights drawn at a tenth of the usual variance against the usual one: the spread over seeds
early in training, with dense twins beside.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.paired import finite, interval
from gatewright.experiments.t_test import upper_tail
from gatewright.parts import Capacity

_WIDTH = 64
# By how much the spread has to fall.
LEAST = 2.0


def _pair(scale: float) -> tuple[Arm, Arm]:
    """Return Switch and its dense twin, every matrix of either drawn with variance scale / fan_in."""
    capacity, losses = Capacity(1.25, eval_factor=2.0), {"balance": 1e-2}
    return (
        Arm(f"{scale:.1f}x", "switch", 8, 1, _WIDTH, losses, capacity=capacity, init_scale=scale),
        Arm(f"dense {scale:.1f}x", None, 1, 1, _WIDTH, init_scale=scale),
    )


PLAN = Plan(
    arms=(*_pair(0.1), *_pair(1.0)),
    baseline="dense 0.1x",
    width=32,
    num_layers=8,
    context=128,
    rows=8,
    steps=384,
    seeds=tuple(range(8)),
    learning_rate=1e-2,
    eval_bytes=32_768,
    evaluations=8,
    quick_seeds=3,
)
CLAIM = (
    "in a decoder of 8 layers, a quarter of the way through training, the bits per byte of Switch spread at "
    "most half as much over 8 seeds (SD) with weights of a tenth of the usual variance as with the usual one"
)


def run_switch_table3(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: three seeds, an eighth of the steps."""
    title = "Initialisation (Switch, table 3)"
    return run_arms(PLAN, work, quick, "switch/table3", title, CLAIM, table3_verdict)


def reached(record: Record, name: str, step: int) -> list[float]:
    """Return an arm's bits per byte at an evaluation, by seed; infinite where it had diverged."""
    found = []
    for own in record["arms"][name]["seeds"]:
        at = [point["valid_bpb"] for point in own["path"] if point["step"] == step]
        found.append(at[0] if at else math.inf)
    return found


def spread(values: Sequence[float]) -> float:
    """Return the SD over seeds; infinite where one diverged or there is one seed only."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.inf


def unequal_spread(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Return the chance of so much more spread in `two` than in `one`, paired, if both spread alike.

    Equation: Pitman-Morgan; t of the correlation r of sums and differences, r sqrt((n - 2) / (1 - r^2)).
    None below three pairs, without spread, or where a value is not finite.
    """
    if len(one) < 3 or not all(map(math.isfinite, [*one, *two])):
        return None
    sums = [a + b for a, b in zip(one, two, strict=True)]
    differences = [b - a for a, b in zip(one, two, strict=True)]
    if statistics.pstdev(sums) == 0 or statistics.pstdev(differences) == 0:
        return None
    r = statistics.correlation(sums, differences)
    left = max(1 - r * r, 1e-15)
    return upper_tail(r * math.sqrt((len(one) - 2) / left), len(one) - 2)


def table3_verdict(record: Record) -> Record:
    """Return whether the small scale spreads at most half as much a quarter of the way through."""
    steps, plan = _steps(record), record["plan"]
    early = next(step for step in steps if 4 * step >= plan["steps"])
    small, usual = (reached(record, name, early) for name in ("0.1x", "1.0x"))
    narrow, wide = spread(small), spread(usual)
    held = math.isfinite(narrow) and wide >= LEAST * narrow
    lost = {name: sum(own["valid_bpb"] is None for own in arm["seeds"]) for name, arm in _arms(record)}
    differences = [b - a for a, b in zip(small, usual, strict=True)]
    chance = unequal_spread(small, usual)
    return {
        "held": held,
        "early_step": early,
        "spread": {"0.1x": finite(narrow), "1.0x": finite(wide)},
        "chance": chance,
        "gaps_bpb": list(map(finite, differences)),
        "diverged": lost,
        "table": _table(record, steps),
        "sentence": f"{'held' if held else 'did not hold'}: at step {early} the SD over {len(small)} seeds "
        f"is {narrow:.4f} at 0.1x and {wide:.4f} at 1.0x"
        + ("" if chance is None else f" (chance of that if they spread alike: {chance:.2g})")
        + f"; 1.0x stands {interval(differences)} bits per byte above 0.1x; runs that diverged: "
        + ", ".join(f"{name} {count}" for name, count in lost.items()),
    }


def _arms(record: Record) -> list[tuple[str, Record]]:
    return list(record["arms"].items())


def _steps(record: Record) -> list[int]:
    """Return the steps of all evaluations, from the run that got furthest."""
    return max(
        ([point["step"] for point in own["path"]] for _, arm in _arms(record) for own in arm["seeds"]),
        key=len,
    )


def _table(record: Record, steps: list[int]) -> list[str]:
    """Return a row per evaluation: mean and SD over seeds of every arm."""
    names = [name for name, _ in _arms(record)]
    lines = [
        "Bits per byte along the runs, mean and SD over seeds (inf: a run diverged, or one seed only).",
        "",
    ]
    lines += [f"| step | {' | '.join(names)} |", "|--:" * (1 + len(names)) + "|"]
    for step in steps:
        own = [reached(record, name, step) for name in names]
        cells = [f"{statistics.fmean(values):.3f} ± {spread(values):.4f}" for values in own]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return [*lines, ""]
