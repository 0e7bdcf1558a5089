"""deep_moe/table2: the speech form on measured vowels, and whether its two gates are independent."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gatewright.experiments.deep_cases import cases_of
from gatewright.experiments.deep_pages import table2_page
from gatewright.experiments.deep_runs import Recipe, kept_run
from gatewright.experiments.deep_table1 import mean_of
from gatewright.experiments.information import effective, shared
from gatewright.inspection.plots.gate_maps import draw_pairs
from gatewright.papers import get_paper
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

Record = dict[str, Any]

ARMS = ("single", "mixture", "concat")
TWO, ONE = "deep-moe-speech", "deep-moe-speech-one-layer"
# Table 2 of the paper: phone errors (shares) in test, then in training, in the order of ARMS.
PAPER = {TWO: ((0.55, 0.55, 0.56), (0.47, 0.42, 0.40)), ONE: ((0.58, 0.55, 0.55), (0.56, 0.50, 0.50))}
CLAIM = (
    "the gates of the two layers share at most a tenth of the smaller one's entropy in at least 80 % of the "
    "seeds, and in two layers training errors are in the order concat, mixture, single from low to high"
)
# Figure 5: at most so much of the smaller gate's entropy counts as independent.
INDEPENDENT = 0.1


_RECIPE = Recipe(20, 40, rate=0.02, batch=20)


@dataclass(frozen=True)
class Table2:
    """What is run: both sizes with all arms; margin: of the constraint, in cases."""

    data: str = "vowels"
    seeds: int = 10
    recipe: Recipe = _RECIPE
    margin: float = 30.0


PLAN = Table2()


def run_table2(work: Path, quick: bool, plan: Table2 = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; quick: five seeds."""
    plan = replace(plan, seeds=min(plan.seeds, 5)) if quick else plan
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(size, arm, seed) for seed in range(plan.seeds) for size in PAPER for arm in ARMS]
    sizes: Record = {size: {arm: [] for arm in ARMS} for size in PAPER}
    with Progress("deep_moe/table2") as progress:
        for number, (size, arm, seed) in enumerate(jobs):

            def show(
                share: float, state: str, number: int = number, of: str = f"{size}, {arm}, seed {seed}"
            ) -> None:
                progress.update((number + share) / len(jobs), f"{of}: {state}")

            settings = settings_of(plan, size, arm)
            run = kept_run(work, f"{size}-{arm}", settings, plan.recipe, plan.data, seed, show)
            gates = run.pop("gates", None)
            sizes[size][arm].append(
                run | ({"pairs": pairs(gates["joint"])} if gates and gates["joint"] else {})
            )
    record: Record = {"schema": "gatewright.deep_moe.v1", "target": "deep_moe/table2", "claim": CLAIM}
    record |= {"quick": quick, "plan": asdict(plan), "paper": PAPER, "sizes": sizes}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(sizes)}
    path = work / "pairs.png"
    first = sizes[TWO]["mixture"][0]
    draw_pairs({f"seed {first['seed']}, test speakers": first["pairs"]["joint"]}, path)
    return record, table2_page(record), {"pairs": path}


def settings_of(plan: Table2, size: str, arm: str) -> Any:
    """Return a published size on the plan's cases, with this top."""
    cases = cases_of(plan.data)
    own = get_paper("deep_moe").PUBLISHED[size]
    return replace(own, width=cases.width, num_classes=cases.num_classes, top=arm, margin=plan.margin)


def pairs(joint: list[list[float]]) -> Record:
    """Return figure 5's statistic of sums of g1 g2 [E1, E2]: what the gates `shared`, as a share of the
    smaller entropy; `farthest`, how far a row's distribution is from the mean one at most (half the sum of
    differences); and how many experts either layer uses.
    """
    table = torch.tensor(joint, dtype=torch.float64)
    rows, mean = table / table.sum(1, keepdim=True), table.sum(0) / table.sum()
    return {
        "joint": joint,
        "shared": shared(table),
        "farthest": float((rows - mean).abs().sum(1).max() / 2),
        "effective": [effective(table.sum(1)), effective(table.sum(0))],
    }


def verdict(sizes: Record) -> Record:
    """Return in how many seeds the gates are independent, and whether training errors are in order."""
    told = [run["pairs"]["shared"] for run in sizes[TWO]["mixture"]]
    independent = sum(value <= INDEPENDENT for value in told)
    single, mixture, concat = (mean_of(sizes[TWO][arm], "train") for arm in ARMS)
    ordered = concat <= mixture <= single
    held = independent >= 0.8 * len(told) and ordered
    return {
        "held": held,
        "independent": independent,
        "ordered": ordered,
        "sentence": f"{'held' if held else 'did not hold'}: the gates share at most {INDEPENDENT:g} of the "
        f"smaller entropy in {independent} of {len(told)} seeds ({statistics.fmean(told):.2f} on average); "
        f"training errors, concat {concat:.1f}, mixture {mixture:.1f}, single {single:.1f} %, are "
        f"{'' if ordered else 'not '}in the paper's order",
    }
