"""What a race shows: comparisons of sides, speed-ups, the verdict over seeds, and the curves over size and
data.
"""

from __future__ import annotations

import statistics
from typing import Any

Record = dict[str, Any]


def crossing(curve: list[Record], target: float, axis: str) -> float | None:
    """Return where `curve` first reaches `target` bits per byte or less on `axis`, linear between
    evaluations; None if never.
    """
    before: Record | None = None
    for point in curve:
        if point["valid_bpb"] <= target:
            if before is None:
                return float(point[axis])
            part = (before["valid_bpb"] - target) / (before["valid_bpb"] - point["valid_bpb"])
            return float(before[axis] + part * (point[axis] - before[axis]))
        before = point
    return None


def step_time_ratio(sparse: Record, dense: Record) -> Record | None:
    """Return {"median", "low", "high"} of seconds per step, sparse over dense, of turns taken in the same
    round.

    `low` and `high` are the 10th and 90th percentile of the paired ratios.
    """
    per_step = [{t["round"]: t["seconds"] / t["steps"] for t in side["turns"]} for side in (sparse, dense)]
    ratios = sorted(per_step[0][n] / per_step[1][n] for n in per_step[0].keys() & per_step[1].keys())
    if not ratios:
        return None
    last = len(ratios) - 1
    return {
        "median": statistics.median(ratios),
        "low": ratios[round(0.1 * last)],
        "high": ratios[round(0.9 * last)],
        "rounds": len(ratios),
    }


def compare_sides(one_seed: Record) -> list[Record]:
    """Return one comparison for each sparse side with each dense side of the same text."""
    sides = one_seed["sides"]
    dense = [s for s in sides if s["kind"] == "dense"]
    sparse = [s for s in sides if s["kind"] == "sparse"]
    return [
        _compare(one_seed["seed"], s, d)
        for s in sparse
        for d in dense
        if s["data_fraction"] == d["data_fraction"]
    ]


def _compare(seed: int, sparse: Record, dense: Record) -> Record:
    target = dense["final"]["valid_bpb"]
    axes = {"tokens": "tokens", "flops": "train_flops", "seconds": "seconds"}
    reached = {name: crossing(sparse["curve"], target, axis) for name, axis in axes.items()}
    gap = target - sparse["final"]["valid_bpb"]
    return {
        "seed": seed,
        "sparse": sparse["name"],
        "dense": dense["name"],
        "against": dense["against"],
        "sparse_parameters": sparse["total_parameters"],
        "data_fraction": dense["data_fraction"],
        "gap_bpb": gap,
        "dense_bpb": target,
        "sparse_bpb": sparse["final"]["valid_bpb"],
        "token_share": sparse["final"]["tokens"] / dense["final"]["tokens"],
        "flop_share": sparse["final"]["train_flops"] / dense["final"]["train_flops"],
        "second_share": sparse["final"]["seconds"] / dense["final"]["seconds"],
        "speedup": {
            name: None if at is None else dense["final"][axes[name]] / max(at, 1e-12)
            for name, at in reached.items()
        },
        "step_time_ratio": step_time_ratio(sparse, dense),
        "held": gap >= 0,
    }


def verdict(comparisons: list[Record], seeds_asked: int) -> Record:
    """Return the sentence over all finished seeds of the headline pair, and who it is. Without a finished
    seed `held` is None.

    Headline: on the largest share of the documents, the sparse side of most parameters against the twin of
    equal compute (or the only one). Held: the mean gap is above the spread of the gaps (max - min over
    seeds); with one seed, the gap is not negative.
    """
    if not comparisons:
        sentence = "No verdict: the race was stopped before its first seed ended; --resume continues it."
        return {"sentence": sentence, "held": None, "gap_mean": None, "gap_spread": None, "seeds": 0}
    first = max(
        comparisons,
        key=lambda c: (c["data_fraction"], c["against"] == "active", c["sparse_parameters"]),
    )
    pair = [c for c in comparisons if (c["sparse"], c["dense"]) == (first["sparse"], first["dense"])]
    gaps = [c["gap_bpb"] for c in pair]
    mean, spread = statistics.fmean(gaps), max(gaps) - min(gaps)
    held = min(gaps) >= 0 and (len(gaps) == 1 or mean > spread)
    tokens, seconds = first["token_share"], statistics.fmean(c["second_share"] for c in pair)
    seeds = (
        f"seed {first['seed']} alone"
        if len(gaps) == 1
        else f"seeds {', '.join(str(c['seed']) for c in pair)}"
    )
    how = f"{abs(mean):.4f} bits per byte {'below' if mean >= 0 else 'above'}"
    spread_words = "" if len(gaps) == 1 else f" (spread of the gaps {spread:.4f})"
    sentence = (
        f"{'Held' if held else 'Not held'}: the sparse model, annealed on {100 * tokens:.0f} % of the "
        f"tokens, ends {how} its dense "
        f"twin annealed on 100 %{spread_words}, in {100 * seconds:.0f} % of its training seconds; {seeds}."
    )
    if len(gaps) < seeds_asked:
        sentence += f" Stopped: {len(gaps)} of {seeds_asked} seeds have ended."
    return {
        "sentence": sentence,
        "held": held,
        "gap_mean": mean,
        "gap_spread": spread,
        "seeds": len(gaps),
        "sparse": first["sparse"],
        "dense": first["dense"],
    }


def scaling_curve(seeds: list[Record]) -> list[Record]:
    """Return one point per sparse side: number of experts of its first sparse layer, size and final
    quality.
    """
    points = []
    for one in seeds:
        for side in one["sides"]:
            if side["kind"] == "sparse":
                experts = side["settings"]["num_experts"]
                points.append(
                    {
                        "num_experts": experts if isinstance(experts, int) else max(experts),
                        "total_parameters": side["total_parameters"],
                        "valid_bpb": side["final"]["valid_bpb"],
                        "seed": one["seed"],
                    }
                )
    return points


def small_data_curve(seeds: list[Record]) -> list[Record]:
    """Return one point per side: share of the documents, kind and final quality."""
    return [
        {
            "fraction": side["data_fraction"],
            "kind": side["kind"],
            "valid_bpb": side["final"]["valid_bpb"],
            "best_bpb": min(point["valid_bpb"] for point in side["curve"]),
            "seed": one["seed"],
        }
        for one in seeds
        for side in one["sides"]
    ]


def triangle(seeds: list[Record]) -> Record:
    """Return the figure of quality, compute and size: a point per side, and each claim of sparse models
    held or not, over all seeds.
    """
    names = [s["name"] for s in seeds[0]["sides"]]

    def mean(name: str, pick: Any) -> float:
        return statistics.fmean(pick(s) for one in seeds for s in one["sides"] if s["name"] == name)

    points = [
        {
            "name": name,
            "kind": side["kind"],
            "valid_bpb": mean(name, lambda s: s["final"]["valid_bpb"]),
            "train_flops": mean(name, lambda s: s["final"]["train_flops"]),
            "total_parameters": side["total_parameters"],
            "active_parameters": side["active_parameters"],
            "seconds": mean(name, lambda s: s["final"]["seconds"]),
        }
        for name, side in zip(names, seeds[0]["sides"], strict=True)
    ]
    by = {(p["kind"], s["against"]): p for p, s in zip(points, seeds[0]["sides"], strict=True)}
    sparse = next(p for p in points if p["kind"] == "sparse")
    return {"points": points, "claims": _claims(sparse, by[("dense", "active")], by[("dense", "total")])}


def _claims(sparse: Record, active: Record, total: Record) -> list[Record]:
    def bits(p: Record) -> str:
        return f"{p['valid_bpb']:.4f}"

    return [
        {
            "claim": "better than a dense model of the same compute per token",
            "held": sparse["valid_bpb"] <= active["valid_bpb"],
            "detail": f"sparse {bits(sparse)}, dense of equal compute {bits(active)} bits per byte",
        },
        {
            "claim": "in less time than a dense model of the same compute per token",
            "held": sparse["valid_bpb"] <= active["valid_bpb"] and sparse["seconds"] <= active["seconds"],
            "detail": f"sparse {sparse['seconds']:.0f} s, dense of equal compute {active['seconds']:.0f} s "
            "of training",
        },
        {
            "claim": "cheaper to train than a dense model of the same size",
            "held": sparse["train_flops"] < total["train_flops"] and sparse["seconds"] < total["seconds"],
            "detail": f"{total['train_flops'] / sparse['train_flops']:.1f} times fewer training FLOPs, "
            f"{total['seconds'] / sparse['seconds']:.1f} times less time than dense of equal size",
        },
        {
            "claim": "as good as a dense model of the same size",
            "held": sparse["valid_bpb"] <= total["valid_bpb"],
            "detail": f"sparse {bits(sparse)}, dense of equal size {bits(total)} bits per byte",
        },
    ]
