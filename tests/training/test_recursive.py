"""The on-line form: recursive least squares is least squares; a step in loops; forgetting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gatewright.backbones import ExpertTree
from gatewright.errors import UserError
from gatewright.objectives import CaseLikelihood
from gatewright.training.em import e_step
from gatewright.training.recursive import Forgetting, OnLine, OnLineGradient, weighted_rls
from gatewright.training.seeded import drawn
from gatewright.training.weighted_fits import least_squares

F = torch.float64


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_recursive_least_squares_ends_at_the_weighed_minimum(forgetting: float):
    draw = np.random.default_rng(0)
    x, y, weights = draw.normal(size=(30, 3)), draw.normal(size=30), draw.uniform(0.1, 1, (30, 1))
    inverse, found = np.eye(3)[None] * 2.0, np.zeros(3)
    for t in range(30):
        gain = weighted_rls(inverse, x[t], weights[t], forgetting)[0]
        found += gain * (y[t] - found @ x[t])
    # The same sums of squares, older cases fading; the start is a ridge of 1 / 2 that fades alike.
    fade = forgetting ** np.arange(29, -1, -1) * weights[:, 0]
    normal = (x * fade[:, None]).T @ x + forgetting**30 * np.eye(3) / 2
    np.testing.assert_allclose(found, np.linalg.solve(normal, (x * fade[:, None]).T @ y), rtol=1e-8)
    np.testing.assert_allclose(inverse[0], np.linalg.inv(normal), rtol=1e-8)


def test_a_case_that_weighs_nothing_teaches_nothing():
    inverse = np.eye(2)[None].copy()
    gain = weighted_rls(inverse, np.array([1.0, 2.0]), np.zeros(1), 0.5)
    assert not gain.any()
    np.testing.assert_allclose(inverse[0], 2 * np.eye(2))


def test_forgetting_moves_six_tenths_of_the_rest_every_thousand_cases():
    schedule = Forgetting()
    assert schedule.at(0) == schedule.at(999) == pytest.approx(0.99)
    assert schedule.at(1000) == pytest.approx(0.996)
    assert schedule.at(2500) == pytest.approx(0.9984)


def tree_of(branching: tuple[int, ...], seed: int = 0) -> ExpertTree:
    return drawn(lambda: ExpertTree(2, branching, 2, init=1.0, gate_init=1.0), seed)


@pytest.mark.parametrize("branching", [(2, 2), (3, 2)])
def test_a_step_is_2_27_to_2_31(branching: tuple[int, ...]):
    tree, start = tree_of(branching), 0.5
    x, y = np.array([[0.4, -1.2]]), np.array([[0.3, 0.9]])
    found = e_step(tree, torch.from_numpy(x), torch.from_numpy(y))
    case = np.append(x[0], 1.0)
    expected = []
    for level, gate in enumerate(tree.levels):
        rows = torch.cat([gate.weight, gate.bias.unsqueeze(-1)], -1).detach().numpy().copy()
        for node in range(rows.shape[0]):
            h = float(found.nodes[level][0, node])
            for branch in range(rows.shape[1]):
                log_h = float(found.branches[level][0, node, branch])
                # (1/start) I + h x x^T, over lambda: the new R times x is start x / (lambda + h start x.x).
                gain = start * case / (0.99 + h * start * case @ case)
                rows[node, branch] += h * gain * (log_h - rows[node, branch] @ case)
        expected.append(rows)
    experts = torch.cat([tree.experts.weight, tree.experts.bias.unsqueeze(-1)], -1).detach().numpy().copy()
    for e in range(tree.num_experts):
        h = float(found.experts[0, e])
        gain = start * case / (0.99 + h * start * case @ case)
        experts[e] += h * np.outer(y[0] - experts[e] @ case, gain)
    learner = OnLine(tree, start=start, least_log=-100.0)
    learner.learn(x, y)
    learner.write()
    for rows, gate in zip(expected, tree.levels, strict=True):
        np.testing.assert_allclose(gate.weight.detach().numpy(), rows[..., :-1], rtol=1e-9)
        np.testing.assert_allclose(gate.bias.detach().numpy(), rows[..., -1], rtol=1e-9)
    np.testing.assert_allclose(tree.experts.weight.detach().numpy(), experts[..., :-1], rtol=1e-9)
    np.testing.assert_allclose(tree.experts.bias.detach().numpy(), experts[..., -1], rtol=1e-9)


def test_a_gradient_step_is_that_of_the_likelihood():
    tree, rate = tree_of((2, 3)), 0.1
    x, y = torch.tensor([[0.4, -1.2]], dtype=F), torch.tensor([[0.3, 0.9]], dtype=F)
    CaseLikelihood()(tree(x), y).total.backward()
    expected = [(p - rate * p.grad).detach() for p in tree.parameters()]
    learner = OnLineGradient(tree, rate=rate)
    learner.learn(x.numpy(), y.numpy())
    learner.write()
    for own, told in zip(tree.parameters(), expected, strict=True):
        torch.testing.assert_close(own.detach(), told)


@pytest.mark.parametrize("kind", [OnLine, OnLineGradient])
def test_two_lines_are_learnt_case_by_case(kind: type[OnLine]):
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (3000, 2))
    y = np.where(x[:, :1] < 0, -3 * x, 2 * x)
    tree = drawn(lambda: ExpertTree(2, (2,), 2), 0)
    learner = kind(tree) if kind is OnLine else OnLineGradient(tree, variance=0.1, rate=0.05)
    for _ in range(2):
        learner.learn(x, y)
    tests = torch.from_numpy(x)
    blend, linear = (
        learner.write()(tests).blend.detach().numpy(),
        least_squares(
            torch.cat([tests, torch.ones(3000, 1, dtype=F)], 1),
            torch.from_numpy(y),
            torch.ones(3000, dtype=F),
            torch.zeros(2, 3, dtype=F),
        ),
    )
    flat = np.concatenate([x, np.ones((3000, 1))], 1) @ linear.numpy().T
    assert np.square(blend - y).mean() < 0.3 * np.square(flat - y).mean()
    assert math.isfinite(float(tree.covariance.sum()))


def test_only_gaussian_experts_learn_on_line():
    with pytest.raises(UserError, match="squash 'softmax' on-line; allowed: linear"):
        OnLine(drawn(lambda: ExpertTree(2, (2,), 2, "softmax"), 0))
