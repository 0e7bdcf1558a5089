"""switch/table2: fp32, bf16, and selective precision, which keeps the router alone in fp32."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gatewright.data import open_corpus
from gatewright.experiments.arms import quick_form, run_arms
from gatewright.experiments.granularity import bits, gaps
from gatewright.experiments.lab import Arm, Plan, Record, kept, stepper_of
from gatewright.experiments.paired import finite, interval
from gatewright.parts import Capacity
from gatewright.training.runlog import Progress

# From how many bits per byte on a difference counts as visible, and from what step time ratio on as a cost.
VISIBLE, COST = 0.01, 1.05


def _arm(name: str, precision: str, router_dtype: str, note: str) -> Arm:
    """Return Switch with 32 experts in a precision; weights and optimizer stay in fp32 in all of them."""
    capacity, losses = Capacity(1.25, eval_factor=2.0), {"balance": 1e-2}
    precisions = {"precision": precision, "router_dtype": router_dtype}
    return Arm(name, "switch", 32, 1, 256, losses, capacity=capacity, note=note, **precisions)  # type: ignore[arg-type]


PLAN = Plan(
    arms=(
        _arm("fp32", "fp32", "fp32", "everything in fp32"),
        _arm("bf16", "bf16", "bf16", "the router's logits, softmax and weights in bf16 too"),
        _arm("selective", "bf16", "fp32", "all but the router in bf16"),
        Arm("dense bf16", None, 1, 1, 256, note="the dense twin", precision="bf16"),
    ),
    baseline="bf16",
    rows=8,
    steps=768,
    eval_bytes=65_536,
    timing_rounds=31,
)
CLAIM = (
    "a router in bf16 makes Switch diverge or end at least 0.01 bits per byte above selective precision, and "
    "above it in every seed; selective precision ends within 0.01 of fp32 and takes at most 5 % more time "
    "than bf16"
)


def run_switch_table2(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its pictures; quick: one seed, an eighth of the steps."""
    plan, shares = quick_form(PLAN) if quick else PLAN, {}
    work.mkdir(parents=True, exist_ok=True)
    for name in ("bf16", "selective"):
        path, settings = work / f"{name}-router.json", {"arm": name, "rounds": plan.timing_rounds}
        shares[name] = kept(path, settings, partial(router_share, plan, plan.arm(name)))
    title = "Precision (Switch, table 2)"
    verdict = partial(table2_verdict, shares)
    return run_arms(PLAN, work, quick, "switch/table2", title, CLAIM, verdict)


def router_share(plan: Plan, arm: Arm) -> Record:
    """Return {"share": ...}: the median share of the forward pass's time that its routers take."""
    with Progress("switch/table2") as progress:
        stepper = stepper_of(plan, arm, open_corpus((), progress=progress.say), 0)
        progress.update(0.0, f"router's share of the time, {arm.name}")
        inside, whole = [0.0], [0.0]
        model: Any = stepper.model
        model.forward = timed(model.forward, whole)
        for router in stepper.routers.values():
            router.route = timed(router.route, inside)  # type: ignore[method-assign]
        shares = []
        for turn in range(2 + plan.timing_rounds):
            inside[0] = whole[0] = 0.0
            stepper.advance()
            shares += [inside[0] / whole[0]] if turn >= 2 else []
    return {"share": statistics.median(shares)}


def timed(call: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """Return the function with its seconds added to `total`'s first number."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        total[0] += time.perf_counter() - started
        return result

    return wrapped


def table2_verdict(shares: Record, record: Record) -> Record:
    """Return whether a bf16 router is worse where selective precision is not, at no cost in speed."""
    worse = gaps(record, "bf16", "selective") if _whole(record, "selective") else [-math.inf]
    lost = {
        name: sum(own["valid_bpb"] is None for own in arm["seeds"]) for name, arm in record["arms"].items()
    }
    bad = _whole(record, "selective") and min(worse) > 0 and statistics.fmean(worse) >= VISIBLE
    near = gaps(record, "selective", "fp32") if _whole(record, "fp32") else [math.inf]
    good = _whole(record, "selective") and abs(statistics.fmean(near)) <= VISIBLE
    ratio = record["arms"]["selective"]["step_time"]
    held = (bad or lost["bf16"] > 0) and good and ratio["median"] <= COST
    flops = record["arms"]["selective"]["cost"]["flops"]
    of_flops = flops["router"] / sum(flops.values())
    return {
        "held": held,
        "bf16_above_selective_bpb": list(map(finite, worse)),
        "selective_above_fp32_bpb": list(map(finite, near)),
        "diverged": lost,
        "router_share_of_flops": of_flops,
        "router_share_of_forward_time": {name: own["share"] for name, own in shares.items()},
        "sentence": f"{'held' if held else 'did not hold'}: bf16 ends {interval(worse)} bits per byte above "
        f"selective precision, selective {interval(near)} above fp32; diverged: "
        + ", ".join(f"{name} {count}" for name, count in lost.items())
        + f"; a selective step takes {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of "
        f"bf16's time, fp32's {record['arms']['fp32']['step_time']['median']:.2f}; the router has "
        f"{100 * of_flops:.1f} % of the FLOPs and "
        + ", ".join(
            f"{100 * own['share']:.0f} % of the forward time in {name}" for name, own in shares.items()
        ),
    }


def recorded_verdict(record: Record) -> Record:
    """Return the verdict of a record that holds the router's share of the time already."""
    took = record["verdict"]["router_share_of_forward_time"]
    return table2_verdict({name: {"share": share} for name, share in took.items()}, record)


def _whole(record: Record, name: str) -> bool:
    """Say whether no seed of an arm diverged."""
    return all(map(math.isfinite, bits(record, name)))
