"""deepseek_v3/scope: load kept even per sequence, per batch or by biases, and what each leaves."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gatewright.backbones import Decoder
from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.trial_pages import Result, above, diverged, run_trials, table
from gatewright.experiments.trials import Course, Trained, Trial, paper_trial
from gatewright.inspection import capture_routing, max_over_mean

SEQUENCE, BATCH, FREE = "loss per sequence", "loss per batch", "biases, no loss"
COEFFICIENT, RATE = 1e-2, 1e-3
Counts = NDArray[np.float64]


def _trial(name: str, note: str, rate: float = 0.0, **losses: float) -> Trial:
    return paper_trial(name, "deepseek_v3", note, losses=losses, bias_rate=rate, future_tokens=0)


COURSE = Course(
    trials=(
        _trial(SEQUENCE, f"weight {COEFFICIENT:g}, biases stay 0", sequence_balance=COEFFICIENT),
        _trial(BATCH, f"weight {COEFFICIENT:g} over all sequences of a step", balance=COEFFICIENT),
        _trial(FREE, f"gamma {RATE:g}", RATE),
    ),
    baseline=SEQUENCE,
    rows=8,
    steps=1024,
)
CLAIM = (
    "a loss per sequence leaves domains less apart in their experts than a loss per batch and than biases, "
    "in every seed; bits per byte are measured"
)


def run_scope(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    title = "The scope of balancing (DeepSeek-V3)"
    return run_trials(COURSE, work, quick, "deepseek_v3/scope", title, CLAIM, scope_verdict, look=look)


def violation(counts: Counts) -> float:
    """Return (max load - mean) / mean over the last axis, mean over the others (Loss-Free Balancing eq 4)."""
    return float(np.mean(max_over_mean(counts) - 1))


def apart(by_domain: Counts) -> float:
    """Return the share of assignments that a domain would have to move for its experts to be used as all
    domains use them on average: mean over domains of half of sum_e |p_de - mean_d p_de|. 0 is alike.

    Args: counts [domains, E].
    """
    shares = by_domain / by_domain.sum(axis=1, keepdims=True)
    return float(np.abs(shares - shares.mean(axis=0)).sum(axis=1).mean() / 2)


def counts_by_window(model: Decoder, windows: torch.Tensor, rows: int) -> dict[str, Counts]:
    """Return what each router chose in each window: {router: [N, E]}, of windows [N, S]."""
    found: dict[str, list[Counts]] = {}
    for part in windows.split(rows):
        for name, own in capture_routing(model, part).items():
            chosen = own.experts.view(len(part), -1)
            one_hot = torch.nn.functional.one_hot(chosen, own.num_experts)
            found.setdefault(name, []).append(one_hot.sum(dim=1).double().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def load_facts(counts: Counts, rows: int) -> dict[str, float]:
    """Return how even one router's load is by sequence, by batch and over all text, and how far apart domains
    are. Batches mix the domains.

    Args: counts [domains, N, E] of N windows of each domain.
    """
    mixed = counts.transpose(1, 0, 2).reshape(-1, counts.shape[2])
    batches = mixed[: len(mixed) // rows * rows].reshape(-1, rows, counts.shape[2]).sum(axis=1)
    return {
        "sequence": violation(mixed),
        "batch": violation(batches),
        "global": violation(mixed.sum(axis=0)),
        "apart": apart(counts.sum(axis=1)),
    }


def look(trained: Trained) -> Record:
    """Return {"load": means over routers of `load_facts`} on validation text."""
    size, rows = trained.course.context, trained.course.rows
    texts = [torch.as_tensor(np.asarray(text), dtype=torch.int64) for text in trained.texts.values()]
    windows = [ids[: len(ids) // size * size].view(-1, size) for ids in texts]
    fewest = min(map(len, windows))
    found = [counts_by_window(trained.model, own[:fewest], rows) for own in windows]
    facts = [load_facts(np.stack([own[name] for own in found]), rows) for name in found[0]]
    return {"load": {key: statistics.fmean(own[key] for own in facts) for key in facts[0]}}


def by_seed(record: Record, name: str, key: str) -> list[float]:
    """Return one fact of an arm's load by seed."""
    return [own["load"][key] for own in record["arms"][name]["seeds"]]


def scope_verdict(record: Record) -> Record:
    """Return whether domains are less apart under a loss per sequence than in both others, in every seed."""
    if lost := diverged(record):
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged"}
    own = by_seed(record, SEQUENCE, "apart")
    more = {
        name: [one - two for one, two in zip(by_seed(record, name, "apart"), own, strict=True)]
        for name in (BATCH, FREE)
    }
    held = min(min(values) for values in more.values()) > 0
    quality = {name: above(record, SEQUENCE, name) or [] for name in (BATCH, FREE)}
    told = "; ".join(
        f"{name}: apart by {interval(more[name], 3)} more, {interval(quality[name])} bits per byte below"
        for name in (BATCH, FREE)
    )
    return {
        "held": held,
        "more_apart": more,
        "below_bpb": quality,
        "table": _table(record),
        "sentence": f"{'held' if held else 'did not hold'}: against a loss per sequence, which leaves "
        f"domains apart by {statistics.fmean(own):.3f} of their assignments, {told}",
    }


def _table(record: Record) -> list[str]:
    """Return a row per arm: evenness by scope and specialisation, means over seeds."""
    keys = ("sequence", "batch", "global", "apart")
    rows = []
    for name in record["arms"]:
        values = [by_seed(record, name, key) for key in keys]
        cells = [f"{statistics.fmean(own):.2f}" for own in values[:-1]]
        rows.append([name, *cells, ", ".join(f"{value:.3f}" for value in values[-1])])
    head = (
        "arm",
        "MaxVio per sequence",
        "per batch",
        "over all text",
        "domains apart, by seed (0: used alike)",
    )
    return ["On validation text, mean over layers:", "", *table(head, rows)]
