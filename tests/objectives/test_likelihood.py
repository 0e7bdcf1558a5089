"""Densities of generalised linear experts, the likelihood of a tree, and its gradients 2.14 to 2.16."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.backbones import ExpertTree
from gatewright.errors import UserError
from gatewright.objectives import CaseLikelihood
from gatewright.objectives.likelihood import joint_posteriors, log_densities, log_likelihood
from gatewright.objectives.mixture import posteriors
from gatewright.training.seeded import drawn

F = torch.float64


def test_densities_by_hand():
    outputs = torch.tensor([[[0.2, 0.3, 0.5]]], dtype=F)
    y = torch.tensor([[0.0, 1.0, 0.0]], dtype=F)
    assert log_densities("softmax", outputs, y).item() == pytest.approx(math.log(0.3))
    told = math.log(0.8) + math.log(0.3) + math.log(0.5)
    assert log_densities("logistic", outputs, y).item() == pytest.approx(told)
    # Residuals -1 and 2; S = diag(1, 4), so r S^-1 r = 1 + 1 and ln|S| = ln 4.
    residual = torch.tensor([[[1.0, -2.0]]], dtype=F)
    zero, wide = torch.zeros(1, 2, dtype=F), torch.diag(torch.tensor([1.0, 4.0], dtype=F)).unsqueeze(0)
    both = 2 * math.log(2 * math.pi)
    assert log_densities("linear", residual, zero, wide).item() == pytest.approx(
        -(2 + math.log(4) + both) / 2
    )
    assert log_densities("linear", residual, zero).item() == pytest.approx(-(5 + both) / 2)
    # S = [[2, 1], [1, 2]], inverse [[2, -1], [-1, 2]] / 3, r S^-1 r = (2 + 4 + 8) / 3, |S| = 3.
    full = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=F)
    assert log_densities("linear", residual, zero, full).item() == pytest.approx(
        -(14 / 3 + math.log(3) + both) / 2
    )


def test_certain_experts_that_are_wrong_stay_finite():
    outputs, y = torch.tensor([[[1.0, 0.0]]], dtype=F), torch.tensor([[0.0, 1.0]], dtype=F)
    for squash in ("softmax", "logistic"):
        assert -2000 < log_densities(squash, outputs, y).item() < -700


def test_unit_gaussians_have_the_posteriors_of_1991():
    draw = torch.Generator().manual_seed(0)
    outputs, logits, y = (torch.randn(s, generator=draw, dtype=F) for s in ((6, 3, 2), (6, 3), (6, 2)))
    found = joint_posteriors(logits, log_densities("linear", outputs, y))
    torch.testing.assert_close(found, posteriors(outputs, logits, y))


def test_the_likelihood_is_a_sum_over_experts():
    logits = torch.log(torch.tensor([[0.25, 0.75]], dtype=F))
    density = torch.log(torch.tensor([[0.4, 0.1]], dtype=F))
    # 0.25 * 0.4 + 0.75 * 0.1 = 0.175, of which the first expert made 0.1.
    assert log_likelihood(logits, density).item() == pytest.approx(math.log(0.175))
    assert joint_posteriors(logits, density)[0, 0].item() == pytest.approx(0.1 / 0.175)


def test_gradients_are_those_of_2_14_to_2_16():
    tree = drawn(lambda: ExpertTree(2, (2, 2), 2, init=1.0, gate_init=1.0), 0)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 2, generator=draw, dtype=F), torch.randn(5, 2, generator=draw, dtype=F)
    CaseLikelihood()(tree(x), y).total.backward()
    output = tree(x)
    h = joint_posteriors(output.logits, log_densities("linear", output.outputs, y)).detach()
    top, low = (own.exp().detach() for own in tree.log_gates(x))
    pairs = h.view(5, 2, 2)
    h_i = pairs.sum(-1)
    residual = y.unsqueeze(1) - output.outputs.detach()
    of_experts = -torch.einsum("te,tec,td->ecd", h, residual, x)
    torch.testing.assert_close(tree.experts.weight.grad, of_experts)
    torch.testing.assert_close(tree.levels[0].weight.grad[0], -(h_i - top[:, 0]).t() @ x)
    of_low = -torch.einsum("tij,td->ijd", h_i.unsqueeze(-1) * (pairs / h_i.unsqueeze(-1) - low), x)
    torch.testing.assert_close(tree.levels[1].weight.grad, of_low)


def test_an_unknown_density_is_refused():
    with pytest.raises(UserError, match="squash 'softmx' has no density; did you mean 'softmax'"):
        log_densities("softmx", torch.zeros(1, 1, 1), torch.zeros(1, 1))
