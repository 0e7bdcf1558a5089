"""sparsely_gated/table6 and table7: what the losses are for, and perplexity at constant operations."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gatewright.experiments.gated import GatedPlan, Model, quick_form, run_rows
from gatewright.experiments.gated_experts import CLAIM as CLAIM9
from gatewright.experiments.gated_experts import run_table9
from gatewright.experiments.gated_pages import picture, table6_page, table7_page
from gatewright.experiments.lab import Record
from gatewright.papers.sparsely_gated import Settings
from gatewright.training.workplace import environment, now

Result = tuple[Record, str, dict[str, Path]]

# An eighth of the paper's widths; the stream of text is short for these sizes, so nothing is dropped.
_SMALL = Settings(width=64, expert_width=128, num_experts=256, num_selected=4, dropout=0.0)
_DENSE = replace(_SMALL, moe_layers="none")
# (w_importance, w_load) -> test perplexity, CV(Importance), CV(Load), max / mean load: table 6.
_TABLE6 = {
    (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
    (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
    (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
    (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
    (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
    (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}
COLUMNS = ("perplexity", "cv_importance", "cv_load", "max_over_mean")


def row_name(importance: float, load: float) -> str:
    """Return "0.1 / 0.1"."""
    return f"{importance:g} / {load:g}"


TABLE6 = GatedPlan(
    tuple(
        Model(
            row_name(*weights),
            replace(_SMALL, num_experts=64, importance_weight=weights[0], load_weight=weights[1]),
            dict(zip(COLUMNS, row, strict=True)),
        )
        for weights, row in _TABLE6.items()
    ),
    steps=3200,
)
CLAIM6 = (
    "64 experts, K = 4: without a loss the busiest expert has more than 5 times the mean load and the "
    "perplexity is the worst; with any loss CV(Importance) is below 0.5 and perplexities are within 2 %"
)


def _row7(name: str, settings: Settings, perplexity: float, operations: float, parameters: float) -> Model:
    paper = {"perplexity": perplexity, "operations": operations, "parameters": parameters}
    return Model(name, settings, paper)


MATCHED = ("MoE-1-Wide", "MoE-1-Deep", "4xLSTM")
GROWING = ("MoE-4", "MoE-32", "MoE-256")
TABLE7 = GatedPlan(
    (
        _row7("MoE-1-Wide", replace(_DENSE, ffn_width=(0, 512)), 46.1, 8.4e6, 8.4e6),
        _row7("MoE-1-Deep", replace(_DENSE, ffn_width=(0, 128), ffn_depth=4), 45.7, 8.4e6, 8.4e6),
        _row7("4xLSTM", replace(_DENSE, num_layers=4), 46.0, 8.4e6, 8.4e6),
        _row7("MoE-4", replace(_SMALL, num_experts=4), 45.0, 8.4e6, 8.4e6),
        _row7("MoE-32", replace(_SMALL, num_experts=32), 39.7, 8.4e6, 37.8e6),
        _row7("MoE-256", _SMALL, 35.7, 8.6e6, 272.9e6),
        _row7("MoE-256-h", replace(_SMALL, gate="groups:16"), 36.0, 8.4e6, 272.9e6),
    ),
    steps=2400,
)
CLAIM7 = (
    "at constant operations perplexity falls from 4 to 32 to 256 experts, and with 256 it is at least 10 % "
    "below the best model of equal operations without sparsity"
)


def run_table6(work: Path, quick: bool, plan: GatedPlan = TABLE6) -> Result:
    """Return the record of table 6, its page and its picture; quick: one seed, a twelfth of the steps."""
    record = run_rows(quick_form(plan, plan.steps // 12) if quick else plan, work, "sparsely_gated/table6")
    _finish(record, "sparsely_gated/table6", CLAIM6, quick, verdict6)
    return record, table6_page(record), picture(record, work, "max_over_mean")


def run_table7(work: Path, quick: bool, plan: GatedPlan = TABLE7) -> Result:
    """Return the record of table 7, its page and its picture; quick: one seed, a tenth of the steps."""
    record = run_rows(quick_form(plan, plan.steps // 10) if quick else plan, work, "sparsely_gated/table7")
    _finish(record, "sparsely_gated/table7", CLAIM7, quick, verdict7)
    return record, table7_page(record), picture(record, work, "perplexity")


def _finish(
    record: Record, target: str, claim: str, quick: bool, verdict: Callable[[Record], Record]
) -> None:
    record |= {"target": target, "claim": claim, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(record)}


def verdict6(record: Record) -> Record:
    """Return the goals and the paper's further directions, each held in every seed or not."""
    rows = record["rows"]
    if any(own["perplexity"] is None for row in rows.values() for own in row["seeds"]):
        return {"held": False, "sentence": "did not hold: a run diverged"}
    bare, *others = rows
    seeds = range(len(rows[bare]["seeds"]))

    def of(name: str, seed: int, column: str) -> float:
        own = rows[name]["seeds"][seed]
        return float(own[column] if column == "perplexity" else own["gates"][column])

    def in_every(check: Callable[[int], bool]) -> bool:
        return all(check(seed) for seed in seeds)

    spread = [max(of(n, s, "perplexity") for n in others) / min(of(n, s, "perplexity") for n in others) - 1
              for s in seeds]  # fmt: skip
    goals = {
        "no loss: max / mean load above 5": in_every(lambda s: of(bare, s, "max_over_mean") > 5),
        "no loss: the worst perplexity": in_every(
            lambda s: of(bare, s, "perplexity") > max(of(n, s, "perplexity") for n in others)
        ),
        "any loss: CV(Importance) below 0.5": in_every(
            lambda s: max(of(n, s, "cv_importance") for n in others) < 0.5
        ),
        "any loss: perplexities within 2 %": max(spread) <= 0.02,
    }
    only_importance, only_load = row_name(0.2, 0), row_name(0, 0.2)
    directions = {
        "importance alone leaves more uneven loads than load alone": in_every(
            lambda s: of(only_importance, s, "cv_load") > of(only_load, s, "cv_load")
        ),
        "load alone leaves more uneven importance than importance alone": in_every(
            lambda s: of(only_load, s, "cv_importance") > of(only_importance, s, "cv_importance")
        ),
        "larger weights, lower max / mean load": in_every(
            lambda s: (
                of(row_name(1, 1), s, "max_over_mean")
                < of(row_name(0.1, 0.1), s, "max_over_mean")
                < of(row_name(0.01, 0.01), s, "max_over_mean")
            )
        ),
    }
    lost = [of(bare, s, "perplexity") / max(of(n, s, "perplexity") for n in others) - 1 for s in seeds]
    held = all(goals.values())
    return {
        "held": held,
        "goals": goals,
        "directions": directions,
        "sentence": f"{'held' if held else 'did not hold'}: without a loss max / mean load "
        f"{_listed([of(bare, s, 'max_over_mean') for s in seeds])} and perplexity {_percent(lost)} against "
        f"the worst with a loss; with any loss CV(Importance) at most "
        f"{max(of(n, s, 'cv_importance') for n in others for s in seeds):.2f}, perplexities within "
        f"{_percent(spread, sign=False)}",
    }


def verdict7(record: Record) -> Record:
    """Return whether perplexity falls with experts and by how much, in every seed."""
    rows = record["rows"]
    if any(own["perplexity"] is None for row in rows.values() for own in row["seeds"]):
        return {"held": False, "sentence": "did not hold: a run diverged"}
    by_seed = [
        {name: row["seeds"][place]["perplexity"] for name, row in rows.items()}
        for place in range(len(record["plan"]["seeds"]))
    ]
    falls = all(own["MoE-4"] > own["MoE-32"] > own["MoE-256"] for own in by_seed)
    below = [1 - own["MoE-256"] / min(own[name] for name in MATCHED) for own in by_seed]
    means = {name: statistics.fmean(own[name] for own in by_seed) for name in rows}
    held = falls and min(below) >= 0.1
    return {
        "held": held,
        "falls": falls,
        "below_best_matched": below,
        "mean_perplexity": means,
        "sentence": f"{'held' if held else 'did not hold'}: perplexity "
        + ", ".join(f"{means[name]:.2f} with {name.rpartition('-')[2]}" for name in GROWING)
        + f" experts ({'falling' if falls else 'not falling'} in every seed); 256 experts are "
        f"{_percent(below, sign=False)} below the best of equal operations",
    }


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _percent(values: list[float], sign: bool = True) -> str:
    return ", ".join(f"{100 * value:{'+' if sign else ''}.1f} %" for value in values)


GATED: dict[str, tuple[str, Callable[[Path, bool], Result]]] = {
    "sparsely_gated/table6": (CLAIM6, run_table6),
    "sparsely_gated/table7": (CLAIM7, run_table7),
    "sparsely_gated/table9": (CLAIM9, run_table9),
}
