"""deepseek_v3/bias: selection biases that balance without a loss, against the same router with a loss."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gatewright.experiments.arms import run_arms
from gatewright.experiments.lab import Arm, Plan, Record

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
# By how much more a mean over seeds may be before quality counts as worse.
MARGIN = 0.005


def _arm(name: str, rate: float, losses: dict[str, float], note: str = "") -> Arm:
    """Return an arm of the sigmoid router of Loss-Free Balancing; a rate of 0 never moves its bias."""
    options: dict[str, Any] = {"rate": rate, "bias_rule": "sign"}
    return Arm(name, "loss_free", 16, 2, 128, losses, options, note=note)


PLAN = Plan(
    arms=(
        _arm("neither", 0.0, {}, "no loss, and a bias that stays 0"),
        *(_arm(f"loss {c:g}", 0.0, {"balance": c}, "loss-controlled") for c in (1e-1, 1e-2, 1e-3)),
        *(_arm(f"bias {u:g}", u, {}, "the paper's u" if u == 1e-3 else "") for u in RATES),
    ),
    baseline="loss 0.01",
    steps=1024,
)
CLAIM = (
    "the best rate of a bias is more even on validation text (MaxVio) than a loss of 0.01 in every seed, and "
    "its bits per byte are on average no more than 0.005 above"
)


def run_bias(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    title = "Balance without a loss (DeepSeek-V3)"
    return run_arms(PLAN, work, quick, "deepseek_v3/bias", title, CLAIM, bias_verdict)


def bias_verdict(record: Record) -> Record:
    """Return whether the most even rate is more even than the loss in every seed, and no worse."""
    names = [*(f"bias {rate:g}" for rate in RATES), "loss 0.01"]
    diverged = [n for n in names if any(own["valid_bpb"] is None for own in record["arms"][n]["seeds"])]
    if diverged:
        return {"held": False, "sentence": f"did not hold: {', '.join(diverged)} diverged"}

    def uneven(name: str) -> list[float]:
        return [own["validation"]["max_violation"] for own in record["arms"][name]["seeds"]]

    def bits(name: str) -> float:
        return statistics.fmean(own["valid_bpb"] for own in record["arms"][name]["seeds"])

    best = min(names[:-1], key=lambda name: statistics.fmean(uneven(name)))
    pairs = list(zip(uneven(best), uneven("loss 0.01"), strict=True))
    worse = bits(best) - bits("loss 0.01")
    held = all(ours < theirs for ours, theirs in pairs) and worse <= MARGIN
    return {
        "held": held,
        "best": best,
        "max_violation": pairs,
        "more_bpb": worse,
        "sentence": f"{'held' if held else 'did not hold'}: {best} has MaxVio "
        + ", ".join(f"{ours:.2f} against {theirs:.2f}" for ours, theirs in pairs)
        + f" with a loss of 0.01 on validation text, and {worse:+.4f} bits per byte on average",
    }
