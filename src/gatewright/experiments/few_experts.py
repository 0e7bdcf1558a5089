"""switch/appendix-d: two, four and eight experts against the dense twin, the paper's small compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.granularity import gaps, told, unless_diverged
from gatewright.experiments.lab import Record
from gatewright.experiments.switch_figure1 import PLAN as FIGURE1
from gatewright.experiments.switch_figure1 import named

_COUNTS = (2, 4, 8)
# Arms of figure 1: with its --work what is trained there is not trained again.
PLAN = dataclasses.replace(FIGURE1, arms=tuple(FIGURE1.arm(named(count)) for count in (1, *_COUNTS)))
CLAIM = "Switch with 2, 4 and 8 experts ends below the dense twin of equal active FLOPs in every seed"


def run_few(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    return run_arms(
        PLAN, work, quick, "switch/appendix-d", "Few experts (Switch, appendix D)", CLAIM, few_verdict
    )


@unless_diverged
def few_verdict(record: Record) -> Record:
    """Return whether every count of experts beats the twin in every seed, and by how much."""
    found = {named(count): gaps(record, named(1), named(count)) for count in _COUNTS}
    held = all(min(values) > 0 for values in found.values())
    shown = "; ".join(f"{name} {told(values)}" for name, values in found.items())
    return {
        "held": held,
        "gaps_bpb": found,
        "sentence": f"{'held' if held else 'did not hold'}: bits per byte below the dense twin: {shown}",
    }
