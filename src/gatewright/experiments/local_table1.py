"""local_experts/table1: mixtures of 4 and 8 experts against nets with 6 and 12 hidden units on the vowels."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gatewright.experiments.lab import kept
from gatewright.experiments.local_page import table1_page, table1_pictures
from gatewright.experiments.t_test import t_test
from gatewright.experiments.vowel_runs import READINGS, best_rate, run_batch
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

Record = dict[str, Any]

MIXTURES = ("local-experts-4", "local-experts-8")
NETS = ("back-propagation-6", "back-propagation-12")
# Table 1: per cent right in training and test, mean and spread of the epochs.
PAPER: dict[str, tuple[int, int, int, int]] = {
    "local-experts-4": (88, 90, 1124, 23),
    "local-experts-8": (88, 90, 1083, 12),
    "back-propagation-6": (88, 90, 2209, 83),
    "back-propagation-12": (88, 90, 2435, 124),
}
# What the paper says by t-test: the first takes fewer epochs than the second, and how sure it is.
CLAIMS = (
    ("local-experts-4", "back-propagation-6", 0.999),
    ("local-experts-8", "back-propagation-12", 0.999),
    ("local-experts-8", "local-experts-4", 0.95),
    ("back-propagation-6", "back-propagation-12", 0.95),
)
CLAIM = (
    "a net needs at least 1.8 times the epochs of the mixture with as many parameters, the mixtures' epochs "
    "spread less, and two or three experts are left in at least 80 % of their runs"
)


@dataclass(frozen=True)
class Table1:
    """What is run: `seeds` runs of each system at the best of `rates`, which `search_seeds` of the same
    starts choose; `inits` are tried beside `init` with as many.
    """

    readings: tuple[str, ...] = ("A", "A, crossed", "B")
    seeds: int = 25
    rates: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
    search_seeds: int = 3
    search_limit: int = 4000
    limit: int = 10_000
    init: float = 0.1
    inits: tuple[float, ...] = (0.01, 0.3, 1.0)


PLAN = Table1()


def quick_form(plan: Table1) -> Table1:
    """Return the plan that takes a minute or two: reading A, five runs, three step sizes."""
    return replace(
        plan,
        readings=("A",),
        seeds=5,
        rates=(0.03, 0.05, 0.1),
        search_seeds=2,
        search_limit=3000,
        limit=6000,
        inits=(),
    )


def run_table1(work: Path, quick: bool, plan: Table1 = PLAN) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture."""
    record = run_plan(quick_form(plan) if quick else plan, work)
    record |= {"target": "local_experts/table1", "claim": CLAIM, "quick": quick}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": verdict(record)}
    return record, table1_page(record), table1_pictures(record, work)


def run_plan(plan: Table1, work: Path) -> Record:
    """Return the record of all readings; every batch is kept in `work`, so a stopped plan goes on."""
    work.mkdir(parents=True, exist_ok=True)
    readings: Record = {}
    jobs = [(reading, size) for reading in plan.readings for size in PAPER]
    with Progress("local_experts/table1") as progress:
        for place, (name, size) in enumerate(jobs):
            progress.update(place / len(jobs), f"{size}, reading {name} ({place + 1} of {len(jobs)})")
            own = readings.setdefault(name, {"about": READINGS[name].about, "systems": {}})
            own["systems"][size] = _system(plan, name, size, work)
    for own in readings.values():
        own["tests"] = [_test(own["systems"], *claim) for claim in CLAIMS]
    return {
        "schema": "gatewright.table1.v1",
        "plan": json.loads(json.dumps(asdict(plan))),
        "paper": {size: list(row) for size, row in PAPER.items()},
        "readings": readings,
    }


def _system(plan: Table1, reading: str, size: str, work: Path) -> Record:
    """Return one system under one reading: the search for its step size, its runs, and other starts."""

    def batch(what: str, init: float, limit: int, runs: Iterable[tuple[int, float]]) -> Record:
        runs = list(runs)
        about = {
            "reading": asdict(READINGS[reading]),
            "size": size,
            "init": init,
            "limit": limit,
            "runs": runs,
        }
        path = work / f"{reading}-{size}-{what}.json".replace(", ", "-")
        return kept(path, about, partial(run_batch, READINGS[reading], size, init, limit, runs))

    tried = [(seed, rate) for rate in plan.rates for seed in range(plan.search_seeds)]
    search = batch("search", plan.init, plan.search_limit, tried)
    rate = best_rate(search, plan.rates)
    if rate is None:
        return {"search": search, "rate": None, "runs": None, "inits": {}}
    runs = batch("runs", plan.init, plan.limit, [(seed, rate) for seed in range(plan.seeds)])
    inits: Record = {}
    if reading == "A":
        same = [(seed, rate) for seed in range(plan.search_seeds)]
        inits = {f"{init:g}": batch(f"init-{init:g}", init, plan.limit, same) for init in plan.inits}
    return {"search": search, "rate": rate, "runs": runs, "inits": inits, "summary": summary(runs)}


def summary(runs: Record) -> Record:
    """Return means and spread of a system's runs; epochs are of those that reached the criterion."""
    epochs = [e for e in runs["epochs"] if e is not None]
    return {
        "reached": len(epochs),
        "epochs_mean": statistics.fmean(epochs) if epochs else None,
        "epochs_sd": statistics.stdev(epochs) if len(epochs) > 1 else None,
        "train_percent": statistics.fmean(runs["train_percent"]),
        "test_percent": statistics.fmean(runs["test_percent"]),
    }


def _test(systems: Record, fewer: str, more: str, paper: float) -> Record:
    """Return the t-test that `fewer` takes fewer epochs than `more`."""
    samples = [
        [e for e in (systems[size]["runs"] or {"epochs": []})["epochs"] if e is not None]
        for size in (fewer, more)
    ]
    found = t_test(*samples)
    return {
        "fewer": fewer,
        "more": more,
        "paper": paper,
        **({"t": None} if found is None else found._asdict()),
    }


def verdict(record: Record) -> Record:
    """Return whether the claim held under reading A, with the figures that it rests on."""
    systems = record["readings"]["A"]["systems"]
    if any(systems[size]["rate"] is None for size in PAPER):
        missing = ", ".join(size for size in PAPER if systems[size]["rate"] is None)
        return {"held": False, "sentence": f"did not hold: at no step size did every run of {missing} end"}
    own = {size: systems[size]["summary"] for size in PAPER}
    ratios = [
        own[net]["epochs_mean"] / own[mix]["epochs_mean"] for mix, net in zip(MIXTURES, NETS, strict=True)
    ]
    spreads = [[own[size]["epochs_sd"] for size in kind] for kind in (MIXTURES, NETS)]
    left = [count for size in MIXTURES for count in systems[size]["runs"]["survivors"]]
    few = sum(count in (2, 3) for count in left)
    stopped = {size: len(systems[size]["runs"]["epochs"]) - own[size]["reached"] for size in PAPER}
    held = min(ratios) >= 1.8 and max(spreads[0]) < min(spreads[1]) and few >= 0.8 * len(left)
    late = ", ".join(f"{count} of {size}" for size, count in stopped.items() if count)
    return {
        "held": held,
        "ratios": ratios,
        "spreads": spreads,
        "two_or_three_left": few / len(left),
        "sentence": f"{'held' if held else 'did not hold'}: the nets take {ratios[0]:.2f} (6 hidden units "
        f"over 4 experts) and {ratios[1]:.2f} (12 over 8) times the epochs; SD {_listed(spreads[0])} of the "
        f"mixtures, {_listed(spreads[1])} of the nets; two or three experts left in {few} of {len(left)} runs"
        + (f"; runs that never reached the criterion: {late}" if late else ""),
    }


def _listed(values: list[float]) -> str:
    return " and ".join(f"{value:.0f}" for value in values)
