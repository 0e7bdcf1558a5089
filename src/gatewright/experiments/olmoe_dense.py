"""olmoe/dense: sparse against dense, at equal active FLOPs and at equal parameters: quality at equal steps,
and the steps and the time to the smaller dense model's final quality.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from gatewright.backbones import Decoder, initialise
from gatewright.experiments.compare import crossing
from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.trial_pages import Result, above, bits, diverged, run_trials, table
from gatewright.experiments.trials import Course, Trial, paper_trial

SPARSE, ACTIVE, TOTAL = "sparse", "dense, active-matched", "dense, total-matched"
_EXPERTS, _SELECTED, _WIDTH = 64, 8, 32


def by_fan_in(model: Decoder) -> None:
    """Draw the weights anew by fan-in: the paper's std of 0.02 is its width's, not that of a small model."""
    initialise.fan_in(model, embedding_std=model.width**-0.5)


def _dense(name: str, width: int, note: str) -> Trial:
    return paper_trial(name, "olmoe", note, change=by_fan_in, moe_layers="none", ffn_width=width)


COURSE = Course(
    trials=(
        paper_trial(
            SPARSE,
            "olmoe",
            f"{_EXPERTS} experts of width {_WIDTH}, {_SELECTED} active",
            change=by_fan_in,
            num_experts=_EXPERTS,
            num_selected=_SELECTED,
            expert_width=_WIDTH,
        ),
        _dense(ACTIVE, _SELECTED * _WIDTH, "one MLP as wide as the experts that a token meets"),
        _dense(TOTAL, _EXPERTS * _WIDTH, "one MLP as wide as all experts together"),
    ),
    baseline=ACTIVE,
    rows=8,
    steps=1024,
    evaluations=16,
    eval_bytes=32_768,
)
CLAIM = (
    "at equal steps the sparse model ends below the dense one of equal active FLOPs in every seed; how far "
    "it is from the dense one of equal parameters, and how long a step takes, is measured"
)


def run_olmoe_dense(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    title = "Sparse against dense (OLMoE)"
    return run_trials(COURSE, work, quick, "olmoe/dense", title, CLAIM, dense_verdict)


def share_of(record: Record, name: str) -> list[float | None]:
    """Return, by seed, the share of its steps in which an arm reaches the final bits per byte of the dense
    model of equal active FLOPs; None if never.
    """
    found = []
    for own, target in zip(record["arms"][name]["seeds"], bits(record, ACTIVE), strict=True):
        at = None if target is None else crossing(own["path"], target, "step")
        found.append(None if at is None else at / record["plan"]["steps"])
    return found


def dense_verdict(record: Record) -> Record:
    """Return whether sparse ends below the dense model of equal active FLOPs in every seed."""
    lost = diverged(record)
    if lost:
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged"}
    gained, left = above(record, ACTIVE, SPARSE) or [], above(record, SPARSE, TOTAL) or []
    held = min(gained) > 0
    times = {name: arm["step_time"]["median"] for name, arm in record["arms"].items()}
    between = above(record, ACTIVE, TOTAL) or []
    closed = statistics.fmean(gained) / statistics.fmean(between) if statistics.fmean(between) > 0 else None
    told = "" if closed is None else f", {100 * closed:.0f} % of the way to the dense one of equal parameters"
    shares = [share for share in share_of(record, SPARSE) if share is not None]
    steps = statistics.fmean(shares) if len(shares) == len(gained) else math.inf
    sooner = (
        f"it is at that model's final quality after {100 * steps:.0f} % of the steps and "
        f"{100 * steps * times[SPARSE]:.0f} % of the time"
        if math.isfinite(steps)
        else "it is not at that model's final quality in every seed"
    )
    return {
        "held": held,
        "gained_bpb": gained,
        "left_bpb": left,
        "share_of_steps": share_of(record, SPARSE),
        "table": _table(record, times),
        "sentence": f"{'held' if held else 'did not hold'}: sparse ends below the dense model of equal "
        f"active FLOPs by {interval(gained)} bits per byte{told}; {sooner}: a step takes "
        f"{times[SPARSE]:.2f} times as long (total-matched: {times[TOTAL]:.2f})",
    }


def _table(record: Record, times: dict[str, float]) -> list[str]:
    """Return a row per arm: what it gains over the smaller dense model, by steps and by time."""
    rows = []
    for name in record["arms"]:
        shares = share_of(record, name)
        steps = ", ".join("never" if s is None else f"{100 * s:.0f} %" for s in shares)
        time = ", ".join("never" if s is None else f"{100 * s * times[name]:.0f} %" for s in shares)
        rows.append([name, interval(above(record, ACTIVE, name) or []), steps, time])
    head = (
        "arm",
        f"bits per byte below {ACTIVE} at equal steps",
        "steps to its final quality, by seed",
        "time to it (steps times step time)",
    )
    return table(head, rows)
