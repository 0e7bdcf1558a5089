"""deep_moe/table1: a mixture on top against one expert, experts side by side, a plain net of equal size."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gatewright.experiments.deep_pages import table1_page
from gatewright.experiments.deep_runs import Recipe, kept_run
from gatewright.inspection.plots.errors import draw_errors
from gatewright.papers import get_paper
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

Record = dict[str, Any]

ARMS = ("single", "mixture", "concat", "plain")
ONE_LAYER = "deep-moe-100-gate-50"
# Table 1 of the paper: errors in % in test, then in training, in the order of ARMS.
PAPER: dict[str, tuple[tuple[float | None, ...], tuple[float | None, ...]]] = {
    "deep-moe-100-100-gates-50-50": ((1.33, 1.42, 1.30, 1.30), (0.85, 0.91, 0.77, 0.60)),
    "deep-moe-100-20-gates-50-50": ((1.58, 1.50, 1.30, 1.41), (1.05, 0.96, 0.85, 0.90)),
    "deep-moe-100-20-gates-50-20": ((1.41, 1.39, 1.30, 1.40), (1.04, 0.98, 0.87, 0.87)),
    "deep-moe-50-20-gates-20-20": ((1.63, 1.77, 1.50, 1.67), (1.60, 1.41, 1.33, 1.32)),
    ONE_LAYER: ((2.86, 1.72, 1.69, None), (2.99, 1.78, 1.59, None)),
}
CLAIM = (
    "of the two-layer sizes, at least three quarters have training errors in the order concat, mixture, "
    "single from low to high; in one layer the mixture's test error is at most 0.8 of the single expert's; "
    "and the plain net's test error is between 0.8 and 1.25 of the mixture's on average over the sizes"
)


_RECIPE = Recipe(1, 4)


@dataclass(frozen=True)
class Table1:
    """What is run: `sizes` of the paper, each with all arms, with `seeds` seeds each."""

    data: str = "mnist"
    sizes: tuple[str, ...] = tuple(PAPER)
    seeds: int = 2
    recipe: Recipe = _RECIPE
    width: int = 1296
    margin: float = 100.0


PLAN = Table1()
QUICK = Table1(
    "digits", ("deep-moe-100-20-gates-50-50", "deep-moe-50-20-gates-20-20", ONE_LAYER), 2, Recipe(20, 30), 256
)


def run_table1(work: Path, quick: bool, plan: Table1 = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; quick: the small digits and fewer sizes."""
    plan = QUICK if quick and plan is PLAN else plan
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(size, arm, seed) for seed in range(plan.seeds) for size in plan.sizes for arm in arms_of(size)]
    sizes: Record = {size: {arm: [] for arm in arms_of(size)} for size in plan.sizes}
    with Progress("deep_moe/table1") as progress:
        for number, (size, arm, seed) in enumerate(jobs):

            def show(
                share: float, state: str, number: int = number, of: str = f"{size}, {arm}, seed {seed}"
            ) -> None:
                progress.update((number + share) / len(jobs), f"{of}: {state}")

            settings = settings_of(size, arm, plan.width, plan.margin)
            run = kept_run(work, f"{size}-{arm}", settings, plan.recipe, plan.data, seed, show)
            run.pop("gates", None)  # figure 2's matter
            sizes[size][arm].append(run)
    record: Record = {"schema": "gatewright.deep_moe.v1", "target": "deep_moe/table1", "claim": CLAIM}
    record |= {"quick": quick, "plan": asdict(plan), "paper": PAPER, "sizes": sizes}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(sizes)}
    path = work / "errors.png"
    _draw(sizes, quick, path)
    return record, table1_page(record), {"errors": path}


def arms_of(size: str) -> tuple[str, ...]:
    """Return the arms that the paper has of a size: the plain net only beside two layers."""
    return ARMS[:3] if size == ONE_LAYER else ARMS


def settings_of(size: str, arm: str, width: int, margin: float) -> Any:
    """Return a published size on pictures of `width` numbers, with another top; plain has as many weights."""
    paper = get_paper("deep_moe")
    own = replace(paper.PUBLISHED[size], width=width, margin=margin)
    return paper.plain_twin(own) if arm == "plain" else replace(own, top=arm)


def mean_of(runs: list[Record], part: str) -> float:
    """Return the mean over seeds of the "train" or "test" error."""
    return statistics.fmean(run[f"{part}_error"] for run in runs)


def verdict(sizes: Record) -> Record:
    """Return whether the three parts of the claim hold of the means over seeds."""
    two = {size: arms for size, arms in sizes.items() if size != ONE_LAYER}
    ordered = []
    for arms in two.values():
        single, mixture, concat = (mean_of(arms[arm], "train") for arm in ARMS[:3])
        ordered.append(concat <= mixture <= single)
    one = sizes[ONE_LAYER]
    layer = mean_of(one["mixture"], "test") / mean_of(one["single"], "test")
    plain = statistics.fmean(
        mean_of(arms["plain"], "test") / mean_of(arms["mixture"], "test") for arms in two.values()
    )
    held = sum(ordered) >= 0.75 * len(ordered) and layer <= 0.8 and 0.8 <= plain <= 1.25
    return {
        "held": held,
        "ordered": sum(ordered),
        "one_layer": layer,
        "plain": plain,
        "sentence": f"{'held' if held else 'did not hold'}: training errors are in the order concat, "
        f"mixture, single in {sum(ordered)} of {len(ordered)} sizes; in one layer the mixture's test error "
        f"is {layer:.2f} of the single expert's; the plain net's is {plain:.2f} of the mixture's",
    }


def _draw(sizes: Record, quick: bool, path: Path) -> None:
    systems, told = {}, {}
    for size, arms in sizes.items():
        for place, (arm, runs) in enumerate(arms.items()):
            name = f"{size.removeprefix('deep-moe-')}, {arm}"
            systems[name] = [run["test_error"] for run in runs]
            paper = PAPER[size][0][place]
            if paper is not None and not quick:
                told[name] = paper
    label = "test error, %: a dot per seed" + ("" if quick else "; upright, the paper's")
    draw_errors(systems, path, label=label, told=told, ours="mixture")
