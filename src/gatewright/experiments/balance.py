"""switch/balance: one small decoder under every way to keep its experts evenly used, and under coefficients
from 1e-1 to 1e-5.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.lab_pages import ranked
from gatewright.parts import Capacity

_COEFFICIENTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Top 1 with the paper's capacity: what an uneven router loses is to be seen.
_SWITCH = Arm(
    "none", "switch", num_selected=1, capacity=Capacity(1.25, eval_factor=2.0), note="no loss at all"
)


def _arm(name: str, note: str, **changes: object) -> Arm:
    return dataclasses.replace(_SWITCH, name=name, note=note, **changes)  # type: ignore[arg-type]


def _bias(rule: str) -> dict[str, object]:
    """Return an arm's settings for a selection bias: hundreds of steps need a faster one than the paper's."""
    return {"router": "loss_free", "options": {"bias_rule": rule, "rate": 1e-2}}


ARMS = (
    _SWITCH,
    *(_arm(f"balance {c:g}", "Switch eq 4-6", losses={"balance": c}) for c in _COEFFICIENTS),
    _arm("balance 0.01 + z 0.001", "ST-MoE eq 6", losses={"balance": 1e-2, "z": 1e-3}),
    _arm("sequence balance 0.01", "DeepSeek-V3 eq 17", losses={"sequence_balance": 1e-2}),
    _arm("gshard 0.01", "GShard algorithm 1, times E^2", losses={"gshard": 1e-2}),
    _arm(
        "importance + load 0.1",
        "2017 eqs 7 and 11, with V-MoE's noise and raw weights",
        router="vmoe",
        losses={"importance": 1e-1, "load": 1e-1},
    ),
    _arm("bias, sign", "Loss-Free Balancing; u ten times the paper's 0.001", **_bias("sign")),
    _arm("bias, proportional", "u times the relative error; u as above", **_bias("proportional")),
    _arm("sinkhorn", "balanced plan in training, argmax in evaluation", router="sinkhorn"),
    _arm("base", "optimal equal assignment in training, argmax in evaluation", router="base"),
    _arm("hash", "a fixed table over token ids", router="hash"),
)

PLAN = Plan(arms=ARMS, baseline="balance 0.01")
CLAIM = (
    "with a balance loss of 0.01 the router is more even (lower MaxVio) and drops fewer tokens than without, "
    "and ends at or below its bits per byte"
)


def run_balance(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    title = "Balance methods, Switch top 1"
    return run_arms(PLAN, work, quick, "switch/balance", title, CLAIM, _verdict)


def _verdict(record: Record) -> Record:
    """Return what is claimed, seed by seed, and whether it held in all."""
    arms = record["arms"]
    pairs = list(zip(arms["none"]["seeds"], arms["balance 0.01"]["seeds"], strict=True))
    gaps = [bare["valid_bpb"] - own["valid_bpb"] for bare, own in pairs]
    violations = [
        (bare["training"]["max_violation"], own["training"]["max_violation"]) for bare, own in pairs
    ]
    dropped = [(bare["training"]["dropped"], own["training"]["dropped"]) for bare, own in pairs]
    held = all(gap >= 0 for gap in gaps)
    held = held and all(own < bare for bare, own in [*violations, *dropped])
    best = ranked(record)[0]
    return {
        "held": held,
        "gaps_bpb": gaps,
        "max_violation": violations,
        "dropped": dropped,
        "sentence": f"{'held' if held else 'did not hold'}: without a loss "
        f"{_listed(gaps)} bits per byte more than with 0.01; MaxVio "
        + ", ".join(f"{bare:.2f} against {own:.2f}" for bare, own in violations)
        + f"; best on average: {best}",
    }


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)
