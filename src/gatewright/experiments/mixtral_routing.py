"""mixtral/routing: table 5, how often neighbouring tokens choose the same expert, by domain and layer."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.trial_pages import Result, diverged, run_trials, table
from gatewright.experiments.trials import Course, Trained, paper_trial
from gatewright.inspection import capture_routing, repetition
from gatewright.inspection.plots.grids import draw_grids

ARM, _EXPERTS, _SELECTED = "8 experts, 2 active", 8, 2
LEAST = 1.25  # times chance; the paper's middle and last layers have 1.6 to 2.3 times
COURSE = Course(
    trials=(
        paper_trial(
            ARM,
            "mixtral",
            "the paper's number of experts; balance loss 0.01, ours",
            num_layers=4,
            num_experts=_EXPERTS,
            num_selected=_SELECTED,
            expert_width=128,
        ),
    ),
    baseline=ARM,
    rows=8,
    steps=2048,
    eval_bytes=131_072,
    timing_rounds=3,
)
CLAIM = (
    "the first choice repeats from one token to the next more often than chance in the middle and the last "
    f"layer, at least {LEAST} times as often on average over domains, and more often than in the first "
    "layer, in every seed"
)
KEYS = ("first", "any_common")
Shares = dict[str, float]


def run_routing(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    title = "Repeated choices (Mixtral, table 5)"
    return run_trials(
        COURSE,
        work,
        quick,
        "mixtral/routing",
        title,
        CLAIM,
        routing_verdict,
        look=look,
        pictures=_pictures,
    )


def repeated(experts: Tensor, num_experts: int) -> Shares:
    """Return the shares of neighbours inside windows that repeat a choice, and what is left of them when each
    window's tokens stand in another order: that comes from uneven use alone.

    Args: `experts` [N, S, K]: N windows of S tokens.
    """
    order = torch.randperm(experts.shape[1], generator=torch.Generator().manual_seed(0))
    kinds = {"": experts, "_shuffled": experts[:, order]}
    found = {kind: [repetition(window, num_experts) for window in own] for kind, own in kinds.items()}
    return {
        f"{key}{kind}": statistics.fmean(getattr(window, key) for window in windows)
        for kind, windows in found.items()
        for key in KEYS
    }


def look(trained: Trained) -> Record:
    """Return the repeated choices of a trained model: {"repetition": {domain: [of each layer]}}."""
    size, found = trained.course.context, {}
    for domain, text in trained.texts.items():
        windows = np.asarray(text[: len(text) // size * size]).reshape(-1, size)
        captured = [capture_routing(trained.model, part) for part in _parts(windows, trained.course.rows)]
        found[domain] = [
            repeated(
                torch.cat([own[router].experts for own in captured]).view(-1, size, _SELECTED),
                captured[0][router].num_experts,
            )
            for router in captured[0]
        ]
    return {"repetition": found}


def _parts(windows: np.ndarray, rows: int) -> list[np.ndarray]:
    return [windows[start : start + rows] for start in range(0, len(windows), rows)]


def chances() -> Shares:
    """Return both shares by chance: 1 / E, and 1 - C(E - K, K) / C(E, K)."""
    own = repetition(np.zeros((2, _SELECTED), dtype=np.int64), _EXPERTS)
    return {"first": own.first_chance, "any_common": own.any_common_chance}


def by_layer(record: Record, key: str) -> list[list[float]]:
    """Return a share's mean over domains, by seed and layer."""
    found = []
    for seed in record["arms"][ARM]["seeds"]:
        layers = zip(*seed["repetition"].values(), strict=True)
        found.append([statistics.fmean(own[key] for own in layer) for layer in layers])
    return found


def routing_verdict(record: Record) -> Record:
    """Return whether middle and last layer repeat above chance and above the first, in every seed."""
    if diverged(record):
        return {"held": False, "sentence": "did not hold: a seed diverged"}
    chance, shares = chances()["first"], by_layer(record, "first")
    middle = len(shares[0]) // 2
    later = [(own[0], own[middle], own[-1]) for own in shares]
    held = all(min(own[1:]) >= LEAST * chance and min(own[1:]) > own[0] for own in later)
    means = [statistics.fmean(own) for own in zip(*later, strict=True)]
    told = ", ".join(f"{100 * mean:.1f} %" for mean in means)
    by_use = statistics.fmean(own[-1] for own in by_layer(record, "first_shuffled"))
    more = [own[-1] - chance for own in later]
    return {
        "held": held,
        "first_choice_by_layer": shares,
        "any_choice_by_layer": by_layer(record, "any_common"),
        "chance": chances(),
        "table": _table(record),
        "sentence": f"{'held' if held else 'did not hold'}: the first choice repeats in {told} of "
        f"neighbouring tokens in the first, the middle and the last layer, {100 * chance:.1f} % by chance; "
        f"the last layer's share lies above chance by {interval(more)}, and is {100 * by_use:.1f} % with the "
        "tokens shuffled",
    }


def mean_over_seeds(record: Record, domain: str, layer: int, key: str) -> float:
    """Return a share of one domain and layer, mean over seeds."""
    seeds = record["arms"][ARM]["seeds"]
    return statistics.fmean(own["repetition"][domain][layer][key] for own in seeds)


def _domains(record: Record) -> tuple[list[str], int]:
    found = record["arms"][ARM]["seeds"][0]["repetition"]
    return list(found), len(next(iter(found.values())))


def _table(record: Record) -> list[str]:
    """Return both shares by domain and layer, means over seeds, beside chance and shuffled tokens."""
    domains, layers = _domains(record)
    head = ["domain"]
    for told in ("first choice", "first or second"):
        head += [f"{told}, layer {layer}" for layer in range(layers)]
    cells = [(key, layer) for key in KEYS for layer in range(layers)]

    def row(name: str, values: list[float]) -> list[str]:
        return [name, *(f"{100 * value:.1f} %" for value in values)]

    rows = [row(d, [mean_over_seeds(record, d, layer, key) for key, layer in cells]) for d in domains]
    shuffled = [
        statistics.fmean(mean_over_seeds(record, d, layer, f"{key}_shuffled") for d in domains)
        for key, layer in cells
    ]
    rows.append(row("mean, tokens shuffled", shuffled))
    rows.append(row("chance", [chances()[key] for key, _ in cells]))
    return table(head, rows)


def _pictures(record: Record, work: Path) -> dict[str, Path]:
    if diverged(record):
        return {}
    domains, layers = _domains(record)
    grids = {
        told: [[mean_over_seeds(record, d, layer, key) for layer in range(layers)] for d in domains]
        for told, key in zip(("first choice", "first or second"), KEYS, strict=True)
    }
    path = work / "repeated.png"
    names = [str(layer) for layer in range(layers)]
    draw_grids(grids, domains, names, ("domain", "layer"), (0.0, 0.8), path)
    return {"repeated": path}
