"""Reproduce an experiment with many arms: quick or full form, record, verdict, page and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gatewright.experiments.lab import Plan, Record, run_plan
from gatewright.experiments.lab_pages import lab_page, lab_pictures
from gatewright.training.workplace import environment, now


def quick_form(plan: Plan) -> Plan:
    """Return the plan that takes minutes: the first seed, an eighth of the steps, less text to evaluate."""
    return dataclasses.replace(
        plan,
        seeds=plan.seeds[: plan.quick_seeds],
        steps=max(plan.steps // 8, 1),
        warmup_steps=max(plan.warmup_steps // 4, 1),
        eval_bytes=plan.eval_bytes // 4,
        timing_rounds=3,
    )


def run_arms(
    plan: Plan,
    work: Path,
    quick: bool,
    target: str,
    title: str,
    claim: str,
    verdict: Callable[[Record], Record],
) -> tuple[Record, str, dict[str, Path]]:
    """Return the record of all arms with its verdict, the page, and the pictures by name."""
    record = run_plan(quick_form(plan) if quick else plan, work, target)
    record |= {"target": target, "claim": claim, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now()}
    record["verdict"] = verdict(record)
    return record, lab_page(record, title), lab_pictures(record, work)
