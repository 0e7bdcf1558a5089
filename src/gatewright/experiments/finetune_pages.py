"""Page, picture and figures of the fine-tuning tables, from their records and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatewright.experiments.pages import measured_with, rates_told, taken_from
from gatewright.experiments.t_test import paired
from gatewright.inspection.plots.rows import draw_rows

Record = dict[str, Any]


def reference(record: Mapping[str, Any]) -> str:
    """Return the side that the others are compared with: the first one of table 8, the second of table 4."""
    sides = list(record["sides"])
    return sides[0] if record["target"].endswith("table8") else sides[1]


def by_seed(record: Mapping[str, Any], side: str) -> list[float]:
    """Return a side's points above the reference by seed, means over tasks."""
    sides, other = record["sides"], reference(record)
    pairs = [zip(sides[side][task], sides[other][task], strict=True) for task in record["tasks"]]
    gaps = [[100 * (mine["accuracy"] - theirs["accuracy"]) for mine, theirs in pair] for pair in pairs]
    return [statistics.fmean(seed) for seed in zip(*gaps, strict=True)]


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the table's lines: test accuracy of every side, task and seed, beside the paper's scores."""
    tasks, paper = list(record["tasks"]), record["paper"]["scores"]
    lines = [
        f"| fine-tuned | {' | '.join(tasks)} | mean | against {reference(record)} | the paper's |",
        f"|---|{'---|' * len(tasks)}--:|---|---|",
    ]
    for side, own in record["sides"].items():
        cells = [", ".join(f"{100 * seed['accuracy']:.1f}" for seed in own[task]) for task in tasks]
        mean = statistics.fmean(100 * seed["accuracy"] for task in tasks for seed in own[task])
        pairs = [
            100 * (mine["accuracy"] - theirs["accuracy"])
            for task in tasks
            for mine, theirs in zip(own[task], record["sides"][reference(record)][task], strict=True)
        ]
        gap = "-" if side == reference(record) else paired(pairs).told()
        theirs = " / ".join(f"{score:.1f}" for score in paper[side])
        lines.append(f"| {side} | {' | '.join(cells)} | {mean:.1f} | {gap} | {theirs} |")
    return lines


def _about(record: Mapping[str, Any]) -> list[str]:
    plan, tasks = record["plan"], record["tasks"]
    model, bits = plan["model"], record["pretrained"]
    chances = ", ".join(f"{name} {100 / len(own['labels']):.0f}" for name, own in tasks.items())
    sizes = next(iter(tasks.values()))["sizes"]
    same = "all" if all(own["sizes"] == sizes for own in tasks.values()) else "the first"
    rates = rates_told(plan["learning_rate"], {s["name"]: s.get("learning_rate") for s in plan["sides"]})
    kinds = {"the sparse one": None, "its twin": plan.get("dense_pretraining_rate")}
    text_rates = rates_told(plan["pretraining_rate"], kinds)
    of = "GLUE / CNNDM / SQuAD / SuperGLUE" if len(plan["sides"]) > 3 else "SuperGLUE"
    return [
        f"Test accuracy in per cent by seed; by chance {chances}. Against: mean difference in points and its "
        f"95 % interval over pairs of a task and a seed. The paper's scores: {of}.",
        "",
        f"Decoders of width {model['width']}, {model['num_layers']} layers, {model['num_experts']} experts "
        f"in each sparse one, trained once on {plan['tokens']:,} tokens of the default corpus: "
        f"{bits['sparse']['bits_per_byte']:.4f} bits per byte, the dense twin of equal FLOPs "
        f"{bits['dense']['bits_per_byte']:.4f} (AdamW at {text_rates}). Then each side on each task: "
        f"{plan['steps']} steps of {plan['rows']} texts, AdamW at {rates}, the best of {plan['evaluations']} "
        f"evaluations by dev accuracy; seeds {', '.join(map(str, plan['seeds']))} order the texts and draw "
        f"the dropout. Of {same} tasks {sizes['train']} texts to train on, {sizes['dev']} dev and "
        f"{sizes['test']} test, no document in two parts. Fine-tuning is dropless: rows of one "
        "length have padding, which is all alike and would fill an expert.",
    ]


def tuned_page(record: Record) -> str:
    """Return the page: claim, verdict, every side, task and seed beside the paper's figures."""
    quick = " --quick" if record["quick"] else ""
    picture = f"{record['target'].replace('/', '-')}{'-quick' if record['quick'] else ''}-rows.png"
    goals = [
        f"- {goal}: {'held' if held else 'not held'}" for goal, held in record["verdict"]["goals"].items()
    ]
    lines = [
        f"# Fine-tuning, table {record['target'].removeprefix('switch/table')} of Switch Transformer",
        "",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        *goals,
        "",
        f"![points against {reference(record)}, every seed, beside the paper's]({picture})",
        "",
        *table(record),
        "",
        *_about(record),
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def tuned_block(record: Mapping[str, Any], source: str) -> str:
    """Return the block of a page in docs: sentence, table, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}.", "", *table(record), "", *_about(record), ""]
    lines.append(taken_from(record, source))
    return "\n".join(lines) + "\n"


def tuned_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw each side's points against the reference, every seed, beside the paper's means."""
    path, paper, base = work / "rows.png", record["paper"]["scores"], reference(record)
    drawn = [
        (side, by_seed(record, side), statistics.fmean(paper[side]) - statistics.fmean(paper[base]))
        for side in record["sides"]
        if side != base
    ]
    draw_rows(drawn, f"points against {base}, mean over tasks (bar: the paper's)", path)
    return {"rows": path}
