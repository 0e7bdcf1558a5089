"""Pages and pictures of experiments with many arms, from their records and from nothing else."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gatewright.experiments.pages import measured_with, rates_told
from gatewright.inspection.plots.arms import draw_arms

Record = dict[str, Any]


def mean_bits(arm: Record) -> float | None:
    """Return the mean of an arm's bits per byte over its seeds, None if one diverged."""
    values = [own["valid_bpb"] for own in arm["seeds"]]
    return None if any(v is None for v in values) else statistics.fmean(values)


def ranked(record: Record, causal_only: bool = True) -> list[str]:
    """Return the arms that did not diverge, best first; those that see later tokens left out."""
    arms = record["arms"].items()
    means = {name: mean_bits(arm) for name, arm in arms if arm["causal"] or not causal_only}
    kept = {name: value for name, value in means.items() if value is not None}
    return sorted(kept, key=lambda name: kept[name])


def _row(name: str, arm: Record) -> list[str]:
    bits = ["diverged" if own["valid_bpb"] is None else f"{own['valid_bpb']:.4f}" for own in arm["seeds"]]
    mean = mean_bits(arm)
    routed = [own for own in arm["seeds"] if "training" in own]

    def average(part: str, key: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        if not routed:
            return "-"
        return f"{scale * statistics.fmean(own[part][key] for own in routed):.{digits}f}{unit}"

    dead = "-" if not routed else f"{statistics.fmean(sum(own['validation']['dead']) for own in routed):.1f}"
    time = arm["step_time"]
    return [
        name if arm["causal"] else f"{name} (looks ahead)",
        "-" if mean is None else f"{mean:.4f}",
        " ".join(bits),
        average("training", "experts_per_token", 2),
        average("training", "max_violation", 2),
        average("validation", "max_violation", 2),
        average("training", "dropped", 1, 100, " %"),
        dead,
        f"{arm['active_flops']:,.0f}",
        f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})",
    ]


def lab_page(record: Record, title: str) -> str:
    """Return the page: claim, verdict, machine, every arm with every seed."""
    plan = record["plan"]
    head = [
        "arm",
        "bits per byte, mean",
        "by seed",
        "experts per token",
        "MaxVio, training batches",
        "MaxVio, validation",
        "dropped in training",
        "dead experts of all layers",
        "active FLOPs of FFN per token",
        "step time over the baseline's",
    ]
    order = ranked(record, causal_only=False)
    order += [name for name in record["arms"] if name not in order]
    rows = [_row(name, record["arms"][name]) for name in order]
    notes = [f"- {name}: {arm['note']}" for name, arm in record["arms"].items() if arm["note"]]
    command = f"gatewright reproduce {record['target']}{' --quick' if record['quick'] else ''}"
    picture = f"{record['target'].replace('/', '-')}{'-quick' if record['quick'] else ''}-arms.png"
    own = {name: arm.get("learning_rate") for name, arm in record["arms"].items()}
    rates = rates_told(plan["learning_rate"], own, " for all arms")
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![bits per byte of every arm]({picture})",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *record["verdict"].get("table", []),
        f"Decoder of width {plan['width']}, {plan['num_layers']} layers, {plan['steps']} steps of "
        f"{plan['rows']} x {plan['context']} tokens (bytes of the default corpus), AdamW at "
        f"{rates}, weight decay {plan['weight_decay']:g}; seeds "
        f"{', '.join(map(str, plan['seeds']))}, all shown. Same tokens in the same order for every arm. "
        "MaxVio: (max load - mean) / mean, of the last fifth of training batches and of all validation text; "
        "a dead expert has less than a tenth of an even share of it. Step times: both sides alternate, "
        f"{plan['timing_rounds']} rounds, median and range of paired ratios; baseline: {record['baseline']}.",
        "",
        *notes,
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def lab_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw bits per byte against step time and return the picture by name."""
    path = work / "arms.png"
    points = []
    for name, arm in record["arms"].items():
        values = [own["valid_bpb"] for own in arm["seeds"] if own["valid_bpb"] is not None]
        if values:
            points.append((name, arm["step_time"]["median"], values, arm["causal"]))
    draw_arms(points, record["baseline"], path)
    return {"arms": path}
