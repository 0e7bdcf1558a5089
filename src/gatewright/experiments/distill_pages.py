"""Page, picture and figures of the distillation tables, from their records and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gatewright.experiments.pages import measured_with, rates_told, taken_from
from gatewright.inspection.plots.rows import draw_rows

Record = dict[str, Any]


class Row(NamedTuple):
    """A teacher's student by one recipe: per cent kept by seed (None: nothing to keep), the paper's, ..."""

    num_experts: int
    recipe: str
    kept: list[float | None]
    paper: float
    compression: float
    paper_compression: float | None
    teacher: list[float]
    student: list[float]


def rows_of(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row per teacher and recipe."""
    plan, paper, seeds = record["plan"], record["paper"], record["seeds"]
    for number in plan["num_experts"]:
        for recipe in (own["name"] for own in plan["recipes"]):
            teachers = [seed["teachers"][str(number)] for seed in seeds]
            students = [own["students"][recipe] for own in teachers]
            yield Row(
                number,
                recipe,
                [own["gain_kept_percent"] for own in students],
                paper["kept"][recipe if recipe in paper["kept"] else str(number)],
                students[0]["compression_percent"],
                paper["compression"][str(number)] if "compression" in paper else None,
                [own["bits_per_byte"] for own in teachers],
                [own["bits_per_byte"] for own in students],
            )


def _listed(values: list[float | None]) -> str:
    return ", ".join("no gain" if value is None else f"{value:.0f}" for value in values)


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table: the dense model, and each teacher with its students."""
    dense, longer = (
        [seed[name]["bits_per_byte"] for seed in record["seeds"]] for name in ("dense", "longer")
    )
    lines = [
        "| teacher's experts | student | bits per byte by seed | gain kept, % by seed | mean | the paper's "
        "| compression, % | the paper's |",
        "|--:|---|---|---|--:|--:|--:|--:|",
        f"| - | plain dense model | {_bits(dense)} | - | 0 | 0 | - | - |",
        f"| - | the same, trained twice as long | {_bits(longer)} | - | - | - | - | - |",
    ]
    shown = None
    for row in rows_of(record):
        if row.num_experts != shown:
            shown = row.num_experts
            lines.append(f"| {shown} | the teacher | {_bits(row.teacher)} | - | 100 | 100 | - | - |")
        known = [value for value in row.kept if value is not None]
        mean = f"{statistics.fmean(known):.0f}" if len(known) == len(row.kept) else "-"
        theirs = "95" if row.paper_compression is None else f"{row.paper_compression:.0f}"
        lines.append(
            f"| {row.num_experts} | {row.recipe} | {_bits(row.student)} | {_listed(row.kept)} | {mean} "
            f"| {row.paper:.0f} | {row.compression:.1f} | {theirs} |"
        )
    return lines


def _bits(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def distilled_page(record: Record) -> str:
    """Return the page: claim, verdict, every model of every seed beside the paper's figures."""
    plan = record["plan"]
    quick = " --quick" if record["quick"] else ""
    picture = f"{record['target'].replace('/', '-')}{'-quick' if record['quick'] else ''}-kept.png"
    goals = [
        f"- {goal}: {'held' if held else 'not held'}" for goal, held in record["verdict"]["goals"].items()
    ]
    kinds = {"dense models": None, "teachers": plan.get("teacher_rate")}
    rates = rates_told(plan["learning_rate"], kinds, " for all")
    model, number = plan["model"], record["target"].removeprefix("switch/table")
    lines = [
        f"# Distillation, table {number} of Switch Transformer",
        "",
        f"Command: `gatewright reproduce {record['target']}{quick}`. Claim: {record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        *goals,
        "",
        f"![per cent of the teacher's gain kept, every seed, beside the paper's]({picture})",
        "",
        *table(record),
        "",
        "Gain kept: 100 (dense - student) / (dense - teacher), of bits per byte on the same validation text; "
        "compression: 100 (1 - student's parameters / teacher's). The paper's teachers have four times the "
        "experts in table 7, and its compressions leave out the student's embedding.",
        "",
        f"Decoders of width {model['width']}, {model['num_layers']} layers, sparse layers "
        f"{model['moe_layers']}, experts {model['expert_width']} wide; {plan['tokens']:,} tokens for each "
        f"model in batches of {plan['batch_tokens']:,} (bytes of the default corpus), AdamW at "
        f"{rates}; seeds {', '.join(map(str, plan['seeds']))}, all shown. Students "
        "have the shape of the largest teacher's dense twin and see the teacher's batches again. A student "
        "that starts from trained weights has been trained for longer: the dense model with a second "
        "schedule from its own weights says what that alone is worth.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def distilled_block(record: Mapping[str, Any], source: str) -> str:
    """Return the block of a page in docs: sentence, table, and where it was measured."""
    lines = [f"The expectation {record['verdict']['sentence']}.", "", *table(record), ""]
    lines.append(taken_from(record, source))
    return "\n".join(lines) + "\n"


def distilled_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw what was kept, every seed, beside the paper's, and return the picture by name."""
    path = work / "kept.png"
    several = len(record["plan"]["num_experts"]) > 1
    drawn = [
        (
            f"{row.num_experts} experts" if several else row.recipe,
            [value for value in row.kept if value is not None],
            row.paper,
        )
        for row in rows_of(record)
    ]
    draw_rows(drawn, "per cent of the gain kept (bar: the paper's)", path)
    return {"kept": path}
