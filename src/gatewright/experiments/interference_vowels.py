"""The vowel half of local_experts/interference: a pair is learned, then the other pair comes to it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gatewright.data.vowels import peterson_barney
from gatewright.experiments.descent import Descent, descend
from gatewright.experiments.lab import kept
from gatewright.experiments.vowel_runs import READINGS, TRAIN
from gatewright.papers import get_paper
from gatewright.training.runlog import Progress
from gatewright.training.seeded import drawn

Record = dict[str, Any]

SYSTEMS = ("local-experts-4", "back-propagation-6", "local-experts-8", "back-propagation-12")
"""Mixture and net of equal size, twice: sizes of `papers.local_experts.PUBLISHED`."""
PAIRS = {"[i], [I] first": ((0, 1), (2, 3)), "[a], [^] first": ((2, 3), (0, 1))}


@dataclass(frozen=True)
class VowelPlan:
    """What is run. `alone` updates on the first pair, then `both` on the two pairs; each system at every one
    of `rates`, all shown.
    """

    seeds: int = 10
    rates: tuple[float, ...] = (0.02, 0.05, 0.1)
    alone: int = 1000
    both: int = 2000
    init: float = 0.1


def run_vowels(plan: VowelPlan, work: Path) -> Record:
    """Return {order: {system: {rate: {"switch", "most", "end", "stayed": one per seed, "path": mean error
    on the first pair by epoch since the switch}}}}; what is finished below `work` is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    found: Record = {}
    jobs = [(order, size, rate) for order in PAIRS for size in SYSTEMS for rate in plan.rates]
    with Progress("local_experts/interference") as progress:
        for place, (order, size, rate) in enumerate(jobs):
            progress.update(place / len(jobs), f"vowels, {order}: {size} at step size {rate:g}")
            settings = {"plan": asdict(plan), "order": order, "size": size, "rate": rate}
            path = work / f"vowels-{place}.json"
            own = kept(path, settings, partial(_run, plan, size, rate, PAIRS[order][0]))
            found.setdefault(order, {}).setdefault(size, {})[f"{rate:g}"] = own
    return found


def _run(plan: VowelPlan, size: str, rate: float, first: tuple[int, int]) -> Record:
    """Return what one system forgot of its first pair, by seed, and what it would have come to without."""
    reading, paper = READINGS["A"], get_paper("local_experts")
    settings = reading.settings(size, plan.init)
    objective = paper.objective(settings)
    vowels = peterson_barney().of_speakers(TRAIN)
    both = reading.cases(vowels)
    own = torch.isin(torch.from_numpy(vowels.vowel), torch.tensor(first))
    pair = both[0][own], both[1][own]
    models = [drawn(lambda: paper.build(settings), seed) for seed in range(plan.seeds)]
    train = partial(descend, objective=objective, rates=[rate] * plan.seeds, reached=0.0)
    learned = train(models, cases=pair, limit=plan.alone)
    seen: list[Tensor] = []

    def watch(epoch: int, live: Tensor, weights: Mapping[str, Tensor]) -> None:
        seen.append(error_on(learned.model, weights, pair))

    train(continued(models[0], learned), cases=both, limit=plan.both, watch=watch)
    stayed = train(continued(models[0], learned), cases=pair, limit=plan.both)
    path = torch.stack(seen)
    return {
        "switch": path[0].tolist(),
        "most": path.amax(0).tolist(),
        "end": path[-1].tolist(),
        "stayed": stayed.squared_error.tolist(),
        "path": [round(value, 6) for value in path.mean(-1)[:: max(plan.both // 100, 1)].tolist()],
    }


def error_on(model: nn.Module, weights: Mapping[str, Tensor], cases: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of each run's blend on the cases, [R]."""
    x, targets = cases
    with torch.no_grad():
        blend = vmap(lambda own: functional_call(model, own, (x,)).blend)(dict(weights))
    return (targets - blend).square().sum(-1).mean(-1)


def continued(model: nn.Module, done: Descent) -> list[nn.Module]:
    """Return a model for each run, with the weights that the run ended with."""
    copies = []
    for run in range(len(done.epochs)):
        copies.append(copy.deepcopy(model))
        copies[-1].load_state_dict({name: own[run] for name, own in done.weights.items()})
    return copies


def setbacks(own: Record) -> list[float]:
    """Return how far each run's error on the first pair rose above what it was at the switch."""
    return [most - switch for most, switch in zip(own["most"], own["switch"], strict=True)]


def costs(own: Record) -> list[float]:
    """Return each run's error on the first pair at the end, over that of staying with the pair alone."""
    return [end - stayed for end, stayed in zip(own["end"], own["stayed"], strict=True)]


def judge_vowels(orders: Record) -> Record:
    """Return whether, in every order, size and step size, the mixture's mean setback is at most half of the
    net's, and in how many of them.
    """
    found = []
    for systems in orders.values():
        for mixture, net in zip(SYSTEMS[::2], SYSTEMS[1::2], strict=True):
            for rate, own in systems[mixture].items():
                ours, theirs = (statistics.fmean(setbacks(one)) for one in (own, systems[net][rate]))
                found.append(ours <= 0.5 * theirs)
    return {
        "held": all(found),
        "sentence": f"vowels: the mixture's setback is at most half of the net's in {sum(found)} of "
        f"{len(found)} comparisons",
    }
