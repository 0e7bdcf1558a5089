"""Runs on the robot arm: each system of hme/table1, its error on the test cases by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap

from gatewright.backbones import ExpertTree
from gatewright.data.robot_arm import arm_cases
from gatewright.experiments.descent import descend
from gatewright.papers import get_paper
from gatewright.training.em import EM, fit_em
from gatewright.training.recursive import Forgetting, OnLine, OnLineGradient
from gatewright.training.seeded import drawn

Record = dict[str, Any]


class Half(NamedTuple):
    """Cases [T, 12] -> [T, 4] as they are learnt: inputs of spread 1, outputs of one common unit."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Arms:
    """Training and test cases of the arm."""

    train: Half
    test: Half

    def error(self, answer: Tensor) -> float:
        """Return the relative error on the test cases: squared error over that of the cases' own mean."""
        y = self.test.y
        return float((answer - y).square().sum() / (y - y.mean(0)).square().sum())


def arms(train: int, test: int, seed: int) -> Arms:
    """Return the cases of a seed. One unit for all outputs, the root of their mean variance, so that squared
    errors keep the proportions they have in rad/s^2.
    """
    drawn_cases = arm_cases(train + test, seed)
    x, y = (torch.from_numpy(own) for own in drawn_cases)
    spread, unit = x[:train].std(0, correction=0), y[:train].var(0, correction=0).mean().sqrt()
    x, y = (x - x[:train].mean(0)) / spread, (y - y[:train].mean(0)) / unit
    return Arms(Half(x[:train], y[:train]), Half(x[train:], y[train:]))


def _run(seed: int, epochs: Sequence[int], errors: Sequence[float], seconds: float, **more: Any) -> Record:
    return {"seed": seed, "epochs": list(epochs), "errors": list(errors), "cpu_seconds": seconds, **more}


def linear_run(cases: Arms) -> Record:
    """Return the best linear map's error: one pass."""
    started = process_time()
    ones, tests = (
        torch.cat([half.x, torch.ones_like(half.x[:, :1])], 1) for half in (cases.train, cases.test)
    )
    weights = torch.linalg.lstsq(ones, cases.train.y).solution
    return _run(0, [1], [cases.error(tests @ weights)], process_time() - started)


def cart_run(cases: Arms) -> Record:
    """Return the error of one regression tree per output."""
    from gatewright.estimators import cart_predictions

    started = process_time()
    x, y, tests = (own.numpy() for own in (cases.train.x, cases.train.y, cases.test.x))
    found = cart_predictions(x, y, tests)
    error = cases.error(torch.from_numpy(found.predictions))
    more = {"leaf_sizes": found.leaf_sizes, "leaves": found.leaves}
    return _run(0, [1], [error], process_time() - started, **more)


def _tree(seed: int, size: str) -> ExpertTree:
    paper = get_paper("hme")
    tree: ExpertTree = drawn(lambda: paper.build(paper.PUBLISHED[size]), seed)
    return tree


def em_run(cases: Arms, seed: int, size: str, em: EM, epochs: int) -> Record:
    """Return a tree's errors after each epoch of expectation-maximisation, and the log likelihood before
    each.
    """
    tree, errors = _tree(seed, size), []
    started = process_time()

    def watch(epoch: int, likelihood: float, own: ExpertTree) -> None:
        with torch.no_grad():
            errors.append(cases.error(own(cases.test.x).blend))

    history = fit_em(tree, *cases.train, epochs=epochs, em=em, watch=watch)
    seconds = process_time() - started
    return _run(seed, range(1, epochs + 1), errors, seconds, log_likelihood=history)


def on_line_run(cases: Arms, seed: int, size: str, epochs: int, gradient: Mapping[str, Any] | None) -> Record:
    """Return a tree's errors after each pass, case by case in a new order each; by 2.17 with a step and a
    variance, or by recursive least squares where `gradient` is None.
    """
    tree, started = _tree(seed, size), process_time()
    learner = OnLine(tree, schedule=Forgetting()) if gradient is None else OnLineGradient(tree, **gradient)
    draw = np.random.default_rng(seed)
    x, y = (own.numpy() for own in cases.train)
    errors = []
    for _ in range(epochs):
        order: NDArray[np.int64] = draw.permutation(len(x))
        learner.learn(x[order], y[order])
        with torch.no_grad():
            errors.append(cases.error(learner.write()(cases.test.x).blend))
    return _run(seed, range(1, epochs + 1), errors, process_time() - started)


def descent_runs(
    cases: Arms, seeds: Sequence[int], size: str, rate: float, epochs: int, every: int
) -> list[Record]:
    """Return the errors of batch descent, all seeds as one program, every so many epochs; `rate` is the step
    per case, so that it does not depend on their number.
    """
    paper, started = get_paper("hme"), process_time()
    models = [drawn(lambda: paper.build(paper.PUBLISHED[size]), seed) for seed in seeds]
    errors: list[list[float]] = [[] for _ in seeds]

    def answer(own: dict[str, Tensor]) -> Tensor:
        blend: Tensor = functional_call(models[0], own, (cases.test.x,)).blend
        return blend

    def watch(epoch: int, live: Tensor, weights: Mapping[str, Tensor]) -> None:
        if epoch == 0 or epoch % every:
            return
        own = {name: value.detach() for name, value in weights.items()}
        with torch.no_grad():
            for run, blend in enumerate(vmap(answer)(own)):
                errors[run].append(cases.error(blend))

    objective = paper.objective(paper.PUBLISHED[size])
    rates = [rate / len(cases.train.x)] * len(seeds)
    descend(models, objective, cases.train, rates, limit=epochs, reached=0.0, watch=watch)
    share = (process_time() - started) / len(seeds)
    passed = range(every, epochs + 1, every)
    return [_run(seed, passed, own, share) for seed, own in zip(seeds, errors, strict=True)]
