"""switch/table6 and switch/table7: what a dense student keeps of a sparse teacher's gain, by the way it is
taught and by the teacher's number of experts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewright.evaluation import gain_kept
from gatewright.experiments.distill_pages import distilled_page, distilled_pictures
from gatewright.experiments.distill_runs import Plan, Recipe, quick_form, run_distilled
from gatewright.training.workplace import environment, now

Record = dict[str, Any]
Result = tuple[Record, str, dict[str, Path]]

PLAIN = Recipe("distillation", 1.0, False)
INIT = Recipe("+ initial non-expert weights from the teacher", 1.0, True)
MIX = Recipe("+ 0.75 of the right answers in the loss", 0.25, True)
UNTAUGHT = Recipe("initial non-expert weights, no distillation", 0.0, True)
# Section 4.2; the last from -1.639 against -1.636 and -1.444: 100 * -0.003 / 0.192.
PAPER6 = {PLAIN.name: 3.0, INIT.name: 20.0, MIX.name: 29.0, UNTAUGHT.name: -1.6}
# Table 7's teachers of 1.1B to 14.7B have 16 to 256 experts: ours are four times smaller.
PAPER7 = {4: 37.0, 8: 32.0, 16: 30.0, 32: 27.0, 64: 28.0}
PAPER7_COMPRESSION = {4: 82.0, 8: 90.0, 16: 95.0, 32: 97.0, 64: 99.0}


TABLE6 = Plan("switch/table6", (64,), (PLAIN, INIT, MIX, UNTAUGHT), 8_192_000)
TABLE7 = Plan("switch/table7", (4, 8, 16, 32, 64), (MIX,), 5_120_000)
CLAIM6 = (
    "a student of a 64-expert teacher keeps at least 25 % of its gain, more with the teacher's non-expert "
    "weights than without and most with 0.75 of the right answers; those weights alone bring nothing"
)
CLAIM7 = (
    "students keep at least 25 % of the gain of teachers of 4 to 64 experts, a smaller share of the larger "
    "teacher's"
)


def shares(record: Record, num_experts: int, recipe: str) -> list[float]:
    """Return the per cent kept, by seed; of a teacher without gain nothing was kept."""
    own = [seed["teachers"][str(num_experts)]["students"][recipe] for seed in record["seeds"]]
    return [0.0 if one["gain_kept_percent"] is None else one["gain_kept_percent"] for one in own]


def _gains(record: Record, num_experts: int) -> list[float]:
    """Return how far the teacher is below the dense model in bits per byte, by seed."""
    return [
        seed["dense"]["bits_per_byte"] - seed["teachers"][str(num_experts)]["bits_per_byte"]
        for seed in record["seeds"]
    ]


def _longer(record: Record, num_experts: int) -> list[float]:
    """Return what training the dense model twice as long gives, in per cent of a teacher's gain, by seed."""
    found = []
    for seed in record["seeds"]:
        bits = [
            own["bits_per_byte"]
            for own in (seed["longer"], seed["teachers"][str(num_experts)], seed["dense"])
        ]
        found.append(gain_kept(*bits) or 0.0)
    return found


def verdict6(record: Record) -> Record:
    """Return which parts of the claim held, on means over seeds."""
    (number,) = record["plan"]["num_experts"]
    means = {name: statistics.fmean(shares(record, number, name)) for name in PAPER6}
    goals = {
        "the teacher is below the dense model in every seed": min(_gains(record, number)) > 0,
        "with all of it at least 25 %": means[MIX.name] >= 25,
        "in the paper's order": means[PLAIN.name] < means[INIT.name] < means[MIX.name],
        "more than weights alone": means[MIX.name] > means[UNTAUGHT.name],
        "weights alone bring at most 10 %": means[UNTAUGHT.name] <= 10,
    }
    told = ", ".join(f"{share:.0f} % ({name})" for name, share in means.items())
    longer = _longer(record, number)
    told += f"; twice as long without a teacher: {statistics.fmean(longer):.0f} %"
    more = {"mean_percent": means, "longer_percent": longer}
    return _verdict(goals, f"kept of the teacher's gain: {told}") | more


def verdict7(record: Record) -> Record:
    """Return which parts of the claim held, on means over seeds."""
    numbers = record["plan"]["num_experts"]
    means = {number: statistics.fmean(shares(record, number, MIX.name)) for number in numbers}
    gains = {number: statistics.fmean(_gains(record, number)) for number in numbers}
    goals = {
        "every teacher is below the dense model": min(gains.values()) > 0,
        "at least 25 % of every teacher's gain": min(means.values()) >= 25,
        "a smaller share of the largest than of the smallest": means[numbers[-1]] < means[numbers[0]],
    }
    told = ", ".join(f"{share:.0f} % of {number} experts'" for number, share in means.items())
    more = {"mean_percent": {str(k): v for k, v in means.items()}}
    return _verdict(goals, f"kept of the teacher's gain: {told}") | more


def _verdict(goals: dict[str, bool], told: str) -> Record:
    missed = [goal for goal, held in goals.items() if not held]
    without = f"; not held: {'; '.join(missed)}" if missed else ""
    word = "did not hold" if missed else "held"
    return {"held": not missed, "goals": goals, "sentence": f"{word}: {told}{without}"}


def _table(
    plan: Plan,
    claim: str,
    verdict: Callable[[Record], Record],
    paper: Record,
    work: Path,
    quick: bool,
) -> Result:
    record = run_distilled(quick_form(plan) if quick else plan, work)
    record |= {"target": plan.target, "claim": claim, "quick": quick, "paper": paper}
    record |= {"environment": environment("cpu"), "created": now()}
    record["verdict"] = verdict(record)
    return record, distilled_page(record), distilled_pictures(record, work)


def run_table6(work: Path, quick: bool, plan: Plan = TABLE6) -> Result:
    """Return the record, its page and its picture; quick: seed 0, fewer tokens."""
    return _table(plan, CLAIM6, verdict6, {"kept": PAPER6}, work, quick)


def run_table7(work: Path, quick: bool, plan: Plan = TABLE7) -> Result:
    """Return the record, its page and its picture; quick: seed 0, fewer tokens, the two outer teachers."""
    paper = {"kept": PAPER7, "compression": PAPER7_COMPRESSION}
    plain: Record = json.loads(json.dumps(paper))
    return _table(plan, CLAIM7, verdict7, plain, work, quick)


DISTILLED: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    "switch/table6": (CLAIM6, run_table6),
    "switch/table7": (CLAIM7, run_table7),
}
