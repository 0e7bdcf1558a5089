"""olmoe/granularity, olmoe/shared, deepseek_moe/ablation: experts of other sizes, and a shared one, at equal
parameters and equal active FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from gatewright.experiments.arms import run_arms
from gatewright.experiments.lab import Arm, Plan, Record

_ACTIVE = 256  # hidden rows that one token meets in every arm: (K + shared) F
STEPS = 1024  # four million tokens: a million is too early to tell such arms apart


def _olmoe(num_experts: int, num_selected: int, shared: int = 0, note: str = "") -> Arm:
    """Return an arm trained as OLMoE is: raw softmax weights, balance 0.01, z 0.001."""
    name = f"{num_experts} / {num_selected}" + (f" + {shared} shared" if shared else "")
    width = _ACTIVE // (num_selected + shared)
    losses = {"balance": 1e-2, "z": 1e-3}
    return Arm(
        name,
        "token_choice_raw",
        num_experts,
        num_selected,
        width,
        losses,
        note=note,
        num_shared_experts=shared,
    )


def _deepseek(num_experts: int, num_selected: int, shared: int, note: str) -> Arm:
    """Return an arm trained as DeepSeekMoE is: raw softmax weights and its balance loss at 0.01."""
    own = _olmoe(num_experts, num_selected, shared)
    return Arm(
        own.name,
        "deepseek_moe",
        num_experts,
        num_selected,
        own.expert_width,
        {"balance": 1e-2},
        note=note,
        num_shared_experts=shared,
    )


GRANULARITY = Plan(
    arms=(
        Arm("dense twin", None, 1, 1, _ACTIVE, note="one MLP of the same active width"),
        *(_olmoe(8 * fine, fine) for fine in (1, 2, 4, 8)),
    ),
    baseline="dense twin",
    steps=STEPS,
)
SHARED = Plan(arms=(_olmoe(32, 4), _olmoe(31, 3, 1)), baseline="32 / 4", steps=STEPS)
ABLATION = Plan(
    arms=(
        _deepseek(16, 2, 0, "GShard's form, without its capacity"),
        _deepseek(15, 1, 1, "one of two is shared"),
        _deepseek(31, 3, 1, "finer: halves"),
        _deepseek(63, 7, 1, "finer still: quarters"),
    ),
    baseline="16 / 2",
    steps=STEPS,
)
GRANULARITY_CLAIM = (
    "at equal parameters and equal active FLOPs, 64 experts of which 8 are active end below 8 of which 1 is, "
    "in every seed, and both below the dense twin"
)
SHARED_CLAIM = "none: how far 31 experts and a shared one are from 32 is measured, in either direction"
ABLATION_CLAIM = (
    "a shared expert and finer ones both help: 16 / 2 is above 15 / 1 + 1 shared, and that above 63 / 7 + 1 "
    "shared, on average over seeds"
)


def bits(record: Record, name: str) -> list[float]:
    """Return an arm's bits per byte by seed; infinite where it diverged."""
    values = (own["valid_bpb"] for own in record["arms"][name]["seeds"])
    return [float("inf") if value is None else value for value in values]


def gaps(record: Record, above: str, below: str) -> list[float]:
    """Return, by seed, by how many bits per byte the first arm ends above the second."""
    return [one - other for one, other in zip(bits(record, above), bits(record, below), strict=True)]


def told(values: list[float]) -> str:
    """Return numbers with their signs."""
    return ", ".join(f"{value:+.4f}" for value in values)


def unless_diverged(verdict: Callable[[Record], Record]) -> Callable[[Record], Record]:
    """Return a verdict that names arms which diverged, in place of comparing what they do not have."""

    @wraps(verdict)
    def judged(record: Record) -> Record:
        names = [n for n, arm in record["arms"].items() if any(s["valid_bpb"] is None for s in arm["seeds"])]
        if names:
            return {"held": False, "sentence": f"did not hold: {', '.join(names)} diverged"}
        return verdict(record)

    return judged


@unless_diverged
def granularity_verdict(record: Record) -> Record:
    """Return whether finer experts end lower in every seed, and both below the twin."""
    fine = gaps(record, "8 / 1", "64 / 8")
    twin = [*gaps(record, "dense twin", "8 / 1"), *gaps(record, "dense twin", "64 / 8")]
    held = min(fine) > 0 and min(twin) > 0
    return {
        "held": held,
        "gaps_bpb": fine,
        "sentence": f"{'held' if held else 'did not hold'}: 8 / 1 ends above 64 / 8 by {told(fine)} bits per "
        f"byte, the dense twin above 8 / 1 by {told(gaps(record, 'dense twin', '8 / 1'))}",
    }


@unless_diverged
def shared_verdict(record: Record) -> Record:
    """Return the gap and its spread; nothing was claimed, so that it always holds."""
    found = gaps(record, "31 / 3 + 1 shared", "32 / 4")
    return {
        "held": True,
        "gaps_bpb": found,
        "sentence": f"measured: with a shared expert {told(found)} bits per byte, mean "
        f"{statistics.fmean(found):+.4f}, spread {max(found) - min(found):.4f}",
    }


@unless_diverged
def ablation_verdict(record: Record) -> Record:
    """Return whether each of the two steps helps on average over seeds."""
    first = gaps(record, "16 / 2", "15 / 1 + 1 shared")
    second = gaps(record, "15 / 1 + 1 shared", "63 / 7 + 1 shared")
    held = statistics.fmean(first) > 0 and statistics.fmean(second) > 0
    return {
        "held": held,
        "shared_bpb": first,
        "finer_bpb": second,
        "sentence": f"{'held' if held else 'did not hold'}: the shared expert takes off {told(first)} "
        f"bits per byte, finer experts then {told(second)}",
    }


Result = tuple[Record, str, dict[str, Path]]


def _target(
    target: str, plan: Plan, title: str, claim: str, verdict: Callable[[Record], Record]
) -> tuple[str, Callable[[Path, bool], Result]]:
    """Return the claim and what runs a plan: (work folder, quick) -> record, page, pictures."""
    return claim, lambda work, quick: run_arms(plan, work, quick, target, title, claim, verdict)


_ABLATION_TITLE = "Shared and finer experts (DeepSeekMoE)"
GRANULAR: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    plan[0]: _target(*plan)
    for plan in (
        ("olmoe/granularity", GRANULARITY, "Granularity (OLMoE)", GRANULARITY_CLAIM, granularity_verdict),
        ("olmoe/shared", SHARED, "A shared expert (OLMoE)", SHARED_CLAIM, shared_verdict),
        ("deepseek_moe/ablation", ABLATION, _ABLATION_TITLE, ABLATION_CLAIM, ablation_verdict),
    )
}
