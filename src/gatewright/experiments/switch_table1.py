"""switch/table1: one expert per token against two and against the dense twin, at three capacity factors:
quality at equal steps, and time to a quality that every arm reaches.
"""

from __future__ import annotations

import math
from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.compare import crossing
from gatewright.experiments.granularity import bits, gaps
from gatewright.experiments.lab import Arm, Plan, Record
from gatewright.experiments.paired import finite, interval
from gatewright.parts import Capacity

_WIDTH, _EXPERTS = 256, 16
FACTORS = (2.0, 1.25, 1.0)
# The best of switch/rates: of the dense model, of Switch at 1.25, of top-2 at 2.0.
DENSE_RATE, SWITCH_RATE, TOP2_RATE = 6e-3, 1.2e-2, 6e-3


def _mixture(name: str, num_selected: int, factor: float, width: int = _WIDTH, note: str = "") -> Arm:
    """Return an arm of eq 2: raw softmax weights; places C = ceil(f T / E) for one and two experts alike, as
    in the paper, first choices before second ones, and none dropped in evaluation (f = E).
    """
    capacity = Capacity(factor, float(_EXPERTS), per_token=True, order="rank")
    losses = {"balance": 1e-2}
    rate = SWITCH_RATE if num_selected == 1 else TOP2_RATE
    return Arm(
        name,
        "token_choice_raw",
        _EXPERTS,
        num_selected,
        width,
        losses,
        capacity=capacity,
        note=note,
        learning_rate=rate,
    )


PLAN = Plan(
    arms=(
        Arm("dense", None, 1, 1, _WIDTH, note="one MLP of an expert's width", learning_rate=DENSE_RATE),
        *(
            _mixture(f"{kind} {factor:g}", selected, factor)
            for factor in FACTORS
            for kind, selected in (("top-2", 2), ("Switch", 1))
        ),
        _mixture(
            "Switch+ 1", 1, 1.0, 2 * _WIDTH, "experts twice as wide: as many padded FLOPs as top-2 at 2.0"
        ),
    ),
    baseline="dense",
    steps=1024,
    eval_bytes=65_536,
    evaluations=12,
    padded=True,
)
CLAIM = (
    "with a capacity of C = ceil(f T / E) places for one and for two experts per token, and every place "
    "computed, Switch at f = 1.0 reaches a quality that all arms reach in less time than top-2 at f = 2.0"
)
OURS, THEIRS = "Switch 1", "top-2 2"


def run_switch_table1(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    title = "Switch, top-2 and dense by capacity (Switch, table 1)"
    return run_arms(PLAN, work, quick, "switch/table1", title, CLAIM, table1_verdict)


def thresholds(record: Record) -> list[float]:
    """Return, by seed, the highest final bits per byte of any arm that did not diverge; -inf if all did."""
    finals = zip(*(bits(record, name) for name in record["arms"]), strict=True)
    return [max((one for one in seed if math.isfinite(one)), default=-math.inf) for seed in finals]


def steps_to(record: Record, name: str, targets: list[float]) -> list[float]:
    """Return, by seed, the steps an arm takes to its seed's target in bits per byte; infinite if never."""
    found = []
    for own, target in zip(record["arms"][name]["seeds"], targets, strict=True):
        at = crossing(own["path"], target, "step") if math.isfinite(target) else None
        found.append(math.inf if at is None else at)
    return found


def times_to(record: Record, name: str, form: str) -> list[float]:
    """Return, by seed, the time to the threshold in dense steps: steps times the ratio of step times."""
    ratio = record["arms"][name][form]["median"]
    return [steps * ratio for steps in steps_to(record, name, thresholds(record))]


def table1_verdict(record: Record) -> Record:
    """Return whether Switch at 1.0 is there sooner than top-2 at 2.0 in every seed, all places computed."""
    ours, theirs = (times_to(record, name, "padded_step_time") for name in (OURS, THEIRS))
    held = all(map(math.isfinite, ours)) and all(one < two for one, two in zip(ours, theirs, strict=True))
    both = all(map(math.isfinite, [*ours, *theirs]))
    logs = [math.log(two / one) for one, two in zip(ours, theirs, strict=True)] if both else []
    ratio = f"log of the ratio {interval(logs, 2)}" if both else "no ratio, since not every run arrives"
    per_step = gaps(record, OURS, THEIRS)
    word = "held" if held else "did not hold"
    return {
        "held": held,
        "thresholds_bpb": list(map(finite, thresholds(record))),
        "log_time_ratio": logs,
        "gaps_bpb": list(map(finite, per_step)),
        "table": _table(record),
        "sentence": f"{word}: to the quality that all arms reach {OURS} takes {_told(ours)} dense steps of "
        f"time and {THEIRS} {_told(theirs)}, all places computed; {ratio}; "
        f"at equal steps {OURS} ends {interval(per_step)} bits per byte above {THEIRS}",
    }


def _told(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" if math.isfinite(value) else "never" for value in values)


def _table(record: Record) -> list[str]:
    """Return a row per arm: its way to the threshold, and what a step of it costs."""
    lines = [
        "Threshold: the highest final bits per byte of any arm in the same seed, which every arm reaches "
        "(linear between evaluations). Time: steps times the step time over the dense twin's, in dense "
        "steps, in two forms: all E C places computed (padded), and kept rows only, which hides what a "
        "capacity costs. Evaluated without drops in every arm. Gap: bits per byte below the dense twin at "
        "equal steps.",
        "",
        "| arm | gap to the dense twin | steps to its final quality | steps to threshold | step time, padded "
        "| step time | time to threshold, padded | time to threshold | padded FLOPs of a layer's experts per "
        "token |",
        "|---|---|---|---|--:|--:|---|---|--:|",
    ]
    twin, common = bits(record, "dense"), thresholds(record)
    for name, arm in record["arms"].items():
        ways = " | ".join(_told(steps_to(record, name, targets)) for targets in (twin, common))
        forms = ("padded_step_time", "step_time")
        steps = " | ".join(f"{arm[form]['median']:.2f}" for form in forms)
        times = " | ".join(_told(times_to(record, name, form)) for form in forms)
        padded = arm["cost"].get("padded", arm["active_flops"])
        gap = interval(gaps(record, "dense", name))
        lines.append(f"| {name} | {gap} | {ways} | {steps} | {times} | {padded:,.0f} |")
    return [*lines, ""]
