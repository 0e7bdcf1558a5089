"""switch/appendix-d: two, four and eight experts against the dense twin, the paper's small compute."""

from __future__ import annotations

from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.granularity import gaps, told, unless_diverged
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.switch_table1 import DENSE_RATE, SWITCH_RATE
from gatewright.parts import Capacity

_WIDTH = 256
_COUNTS = (2, 4, 8)


def _switch(num_experts: int) -> Arm:
    return Arm(
        f"{num_experts} experts",
        "switch",
        num_experts,
        1,
        _WIDTH,
        {"balance": 1e-2},
        capacity=Capacity(1.25, eval_factor=2.0),
        learning_rate=SWITCH_RATE,
    )


PLAN = Plan(
    arms=(Arm("dense twin", None, 1, 1, _WIDTH, learning_rate=DENSE_RATE), *map(_switch, _COUNTS)),
    baseline="dense twin",
    steps=1024,
)
CLAIM = "Switch with 2, 4 and 8 experts ends below the dense twin of equal active FLOPs in every seed"


def run_few(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    return run_arms(
        PLAN, work, quick, "switch/appendix-d", "Few experts (Switch, appendix D)", CLAIM, few_verdict
    )


@unless_diverged
def few_verdict(record: Record) -> Record:
    """Return whether every count of experts beats the twin in every seed, and by how much."""
    found = {f"{count} experts": gaps(record, "dense twin", f"{count} experts") for count in _COUNTS}
    held = all(min(values) > 0 for values in found.values())
    shown = "; ".join(f"{name} {told(values)}" for name, values in found.items())
    return {
        "held": held,
        "gaps_bpb": found,
        "sentence": f"{'held' if held else 'did not hold'}: bits per byte below the dense twin: {shown}",
    }
