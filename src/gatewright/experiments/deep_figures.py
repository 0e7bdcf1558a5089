"""deep_moe/figure2 and deep_moe/collapse: what each layer goes by, and what the constraint does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.experiments.deep_pages import collapse_page, figure2_page
from gatewright.experiments.deep_runs import Recipe, kept_run
from gatewright.experiments.information import effective, information, known, shared
from gatewright.inspection.plots.gate_maps import draw_effective, draw_maps
from gatewright.papers import get_paper
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

Record = dict[str, Any]
Made = tuple[Record, str, dict[str, Path]]

# The first layer goes by place, the second by class, each at least so many times as much as the other way.
FACTOR = 2.0
FACTORED = (
    "the first layer's gate tells more than twice as much of the place as of the class, and the second "
    "layer's more than twice as much of the class as of the place, in at least 4 of 5 seeds"
)
COLLAPSE = (
    "with the constraint in the first phase, each layer uses at least 3 of its 4 experts' worth to the end "
    "in at least 4 of 5 seeds; without it, the less even layer ends lower in at least 4 of 5, by at least "
    "half an expert on average"
)


_RECIPE = Recipe(2, 3)


@dataclass(frozen=True)
class Maps:
    """What is run: `size` of the paper's PUBLISHED (none: its default), on `data`."""

    data: str = "mnist"
    size: str = "deep-moe-100-20-gates-50-50"
    seeds: int = 5
    recipe: Recipe = _RECIPE

    @property
    def settings(self) -> Any:
        """Return the model's settings."""
        paper = get_paper("deep_moe")
        return paper.PUBLISHED[self.size] if self.size else paper.Settings()


PLAN = Maps()
QUICK = Maps("digits", "", recipe=Recipe(40, 60))


def run_figure2(work: Path, quick: bool, plan: Maps = PLAN) -> Made:
    """Return the record, its page and its picture; quick: the small digits."""
    plan = replace(QUICK, seeds=plan.seeds) if quick else plan
    runs = _runs(work, "deep_moe/figure2", plan, {"mixture": plan.recipe})["mixture"]
    record = _record("deep_moe/figure2", FACTORED, quick, plan)
    record["runs"] = [{**run, "tells": tells(run["gates"])} for run in runs]
    record["verdict"] = figure2_verdict(record)
    path = work / "maps.png"
    draw_maps(record["runs"][0]["gates"], path)
    return record, figure2_page(record), {"maps": path}


def run_collapse(work: Path, quick: bool, plan: Maps = PLAN) -> Made:
    """Return the record, its page and its picture; quick: the small digits."""
    plan = replace(QUICK, seeds=plan.seeds) if quick else plan
    free = replace(plan.recipe, first=0, second=plan.recipe.first + plan.recipe.second)
    record = _record("deep_moe/collapse", COLLAPSE, quick, plan)
    arms = {"constraint, then none": plan.recipe, "no constraint": free}
    found = _runs(work, "deep_moe/collapse", plan, arms)
    record["runs_by_arm"] = {
        name: [{**_without_gates(run), "left": left(run["gates"])} for run in runs]
        for name, runs in found.items()
    }
    record["verdict"] = collapse_verdict(record)
    path = work / "experts.png"
    curves = {name: [run["curve"] for run in runs] for name, runs in record["runs_by_arm"].items()}
    draw_effective(curves, plan.recipe.first, path)
    return record, collapse_page(record), {"experts": path}


def _without_gates(run: Record) -> Record:
    return {key: value for key, value in run.items() if key != "gates"}


def _record(target: str, claim: str, quick: bool, plan: Maps) -> Record:
    return {
        "schema": "gatewright.deep_moe.v1",
        "target": target,
        "claim": claim,
        "quick": quick,
        "plan": asdict(plan),
        "settings": asdict(plan.settings),
        "environment": environment("cpu"),
        "created": now(),
    }


def _runs(work: Path, target: str, plan: Maps, arms: dict[str, Recipe]) -> dict[str, list[Record]]:
    """Return every seed's run of every arm, kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(plan.seeds) for name in arms]
    found: dict[str, list[Record]] = {name: [] for name in arms}
    with Progress(target) as progress:
        for number, (name, seed) in enumerate(jobs):

            def show(
                share: float, state: str, number: int = number, name: str = name, seed: int = seed
            ) -> None:
                progress.update((number + share) / len(jobs), f"{name}, seed {seed}: {state}")

            file = name.replace(", ", "-").replace(" ", "-")
            found[name].append(kept_run(work, file, plan.settings, arms[name], plan.data, seed, show))
    return found


def tells(gates: Record) -> list[Record]:
    """Return for each layer how much its gate says of place and class: `known`, as a share of the gate's
    entropy, and `nats`; how many experts it uses; for two layers in the first also what they share.
    """
    layers = []
    for place, label in zip(gates["place"], gates["label"], strict=True):
        counts = {"place": _experts_first(place), "class": _experts_first(label)}
        layers.append(
            {
                "known": {of: known(own) for of, own in counts.items()},
                "nats": {of: information(own) for of, own in counts.items()},
                "effective": effective(counts["place"].sum(1)),
            }
        )
    if gates["joint"] is not None:
        layers[0]["shared"] = shared(torch.tensor(gates["joint"]))
    return layers


def _experts_first(table: list[list[float]]) -> Tensor:
    return torch.tensor(table, dtype=torch.float64).t()


def left(gates: Record) -> list[float]:
    """Return how many experts' worth each layer uses over the test pictures at all places."""
    return [effective(_experts_first(table).sum(1)) for table in gates["place"]]


def factored(layers: list[Record]) -> tuple[bool, bool]:
    """Return whether the first layer goes by place and the second by class, each by more than FACTOR."""
    first, second = (own["known"] for own in layers)
    return first["place"] > FACTOR * first["class"], second["class"] > FACTOR * second["place"]


def figure2_verdict(record: Record) -> Record:
    """Return in how many seeds both layers go by what they are claimed to."""
    found = [factored(run["tells"]) for run in record["runs"]]
    both, first, second = (
        sum(map(all, found)),
        sum(own[0] for own in found),
        sum(own[1] for own in found),
    )
    held = len(found) >= 5 and both >= 0.8 * len(found)
    return {
        "held": held,
        "both": both,
        "sentence": f"{'held' if held else 'did not hold'}: both layers do in {both} of {len(found)} seeds, "
        f"the first alone in {first}, the second alone in {second}",
    }


def collapse_verdict(record: Record) -> Record:
    """Return whether experts stay in use with the constraint, and fewer do without it."""
    with_it, without = ([min(run["left"]) for run in runs] for runs in record["runs_by_arm"].values())
    stay = sum(value >= 3 for value in with_it)
    lower = sum(b < a for a, b in zip(with_it, without, strict=True))
    gap = sum(with_it) / len(with_it) - sum(without) / len(without)
    count = len(with_it)
    held = count >= 5 and stay >= 0.8 * count and lower >= 0.8 * count and gap >= 0.5
    return {
        "held": held,
        "gap": gap,
        "sentence": f"{'held' if held else 'did not hold'}: with the constraint the less even layer ends "
        f"with at least 3 experts' worth in {stay} of {count} seeds; without it, it ends lower in {lower}, "
        f"by {gap:.2f} on average",
    }
