"""local_experts/interference: what learning something new does to what one model, or a mixture, knew."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gatewright.experiments.interference_text import TextPlan, cost, judge_text, run_text, setback
from gatewright.experiments.interference_vowels import (
    SYSTEMS,
    VowelPlan,
    costs,
    judge_vowels,
    run_vowels,
    setbacks,
)
from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.setbacks import draw_setbacks
from gatewright.training.workplace import environment, now

Record = dict[str, Any]

CLAIM = (
    "what was learned first suffers less in a mixture when something new is to be learned beside it: vowel "
    "pairs (setback at most half of the net's), and domains of text (cost below the dense twin's)"
)


@dataclass(frozen=True)
class Interference:
    """What is run."""

    vowels: VowelPlan = field(default_factory=VowelPlan)
    text: TextPlan = field(default_factory=TextPlan)


PLAN = Interference()


def quick_form(plan: Interference) -> Interference:
    """Return the plan that takes two minutes: three seeds and one step size, one order of short runs."""
    text = replace(plan.text, orders=plan.text.orders[:1], seeds=(0,), rates=plan.text.rates[1:2])
    text = replace(text, steps=text.steps // 4, every=text.every // 2, eval_bytes=text.eval_bytes // 2)
    return Interference(replace(plan.vowels, seeds=3, rates=plan.vowels.rates[1:2]), text)


def run_interference(
    work: Path, quick: bool, plan: Interference = PLAN
) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture."""
    plan = quick_form(plan) if quick else plan
    record: Record = {"schema": "gatewright.interference.v1", "plan": asdict(plan)}
    record["vowels"] = run_vowels(plan.vowels, work)
    record["text"] = run_text(plan.text, work)
    record |= {"target": "local_experts/interference", "claim": CLAIM, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(record)}
    path = work / "setbacks.png"
    draw_setbacks(_curves(record), path)
    return record, interference_page(record), {"setbacks": path}


def verdict(record: Record) -> Record:
    """Return whether both halves held, each in its own words."""
    halves = [judge_vowels(record["vowels"]), judge_text(record["text"]["runs"])]
    held = all(half["held"] for half in halves)
    said = "; ".join(half["sentence"] for half in halves)
    return {"held": held, "sentence": f"{'held' if held else 'did not hold'}: {said}"}


def _curves(record: Record) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return {panel: {line: [(x, y)]}}: the error on what was learned first, since the switch."""
    plan = record["plan"]
    order, systems = next(iter(record["vowels"].items()))
    rate = next(r for r in (f"{r:g}" for r in plan["vowels"]["rates"]) if r in systems[SYSTEMS[0]])
    stride = max(plan["vowels"]["both"] // 100, 1)
    panels = {
        f"vowels, {order}, step size {rate}: squared error on the first pair, by epoch": {
            size: [(place * stride, value) for place, value in enumerate(own[rate]["path"])]
            for size, own in systems.items()
        }
    }
    for order, sides in record["text"]["runs"].items():
        lines = {}
        for side, runs in sides.items():
            for kind in ("joined", "stayed"):
                points = zip(*(run[kind]["path"] for run in runs), strict=True)
                lines[f"{side}, {kind}"] = [
                    (own[0][0] - plan["text"]["steps"], statistics.fmean(v for _, v in own)) for own in points
                ]
        panels[f"{order}: bits per byte on the first domain, by step"] = lines
    return panels


def interference_page(record: Record) -> str:
    """Return the page: claim, verdict, every comparison of both halves."""
    plan, quick = record["plan"], record["quick"]
    vowels, text = plan["vowels"], plan["text"]
    lines = [
        "# Interference (1991): one net for everything, or a mixture",
        "",
        f"Command: `gatewright reproduce {record['target']}{' --quick' if quick else ''}`. Claim: "
        f"{record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        "![error on what was learned first]"
        f"(local_experts-interference{'-quick' if quick else ''}-setbacks.png)",
        "",
        "## Vowels",
        "",
        f"{vowels['alone']} updates on one pair of vowels, then {vowels['both']} on both; seeds 0 to "
        f"{vowels['seeds'] - 1}; reading A of table 1, the gradient summed over the cases. Setback: how far "
        "the mean squared error on the first pair's training cases rises above what it was when the other "
        "pair came; in brackets the cost, its error at the end over that of as many more updates on the "
        "first pair alone. Means over seeds.",
        "",
        *vowel_table(record["vowels"]),
        "",
        "## Text",
        "",
        f"{text['steps']} steps of {text['rows']} rows of 256 bytes on one domain, then as many with as many "
        "rows of a second domain added; 16 experts of width 128, two per token, against one layer of equal "
        "FLOPs. Each side at its best rate for the first domain. Cost: bits per byte on the first domain's "
        "held-out text at the end, over those of the same run that stayed with the first domain alone.",
        "",
        *text_table(record["text"]["runs"]),
        "",
        "Bits per byte on the first domain by rate, seed 0, before the switch: "
        + "; ".join(
            f"{order}, {side}: " + ", ".join(f"{rate}: {bits:.4f}" for rate, bits in found.items())
            for order, sides in record["text"]["rates"].items()
            for side, found in sides.items()
        )
        + ".",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def vowel_table(orders: Record) -> list[str]:
    """Return a row per order and step size: each system's setback and cost, means over seeds."""
    rows = ["| order | step size | " + " | ".join(SYSTEMS) + " |", "|---|---" + "|--:" * len(SYSTEMS) + "|"]
    for order, systems in orders.items():
        for rate in systems[SYSTEMS[0]]:
            cells = [
                f"{statistics.fmean(setbacks(systems[size][rate])):.4f} "
                f"({statistics.fmean(costs(systems[size][rate])):+.4f})"
                for size in SYSTEMS
            ]
            rows.append(f"| {order} | {rate} | " + " | ".join(cells) + " |")
    return rows


def text_table(orders: Record) -> list[str]:
    """Return a row per order and side: its rate, its cost by seed, and where its runs stood."""
    rows = [
        "| order | side | rate | cost by seed | mean | setback, mean | at the switch | at the end |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for order, sides in orders.items():
        for side, runs in sides.items():
            by_seed = [cost(run) for run in runs]
            means = [statistics.fmean(by_seed), statistics.fmean(setback(run) for run in runs)]
            ends = [statistics.fmean(run["joined"][key] for run in runs) for key in ("switch", "end")]
            rows.append(
                f"| {order} | {side} | {runs[0]['rate']:g} | {' '.join(f'{c:+.4f}' for c in by_seed)} | "
                f"{means[0]:+.4f} | {means[1]:.4f} | {ends[0]:.4f} | {ends[1]:.4f} |"
            )
    return rows
