"""The three error functions of 1991: values by loops, gradients by the paper's own closed forms."""

from __future__ import annotations

import math
from collections import namedtuple

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives import CaseError
from gatewright.objectives.mixture import (
    ERRORS,
    blend_error,
    expected_error,
    mixture_error,
    posteriors,
)

T, E, C = 5, 4, 3
Output = namedtuple("Output", "outputs logits")


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs [T, E, C], logits [T, E] and targets [T, C] in fp64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((T, E, C), (T, E), (T, C))
    outputs, logits, targets = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return outputs.requires_grad_(), logits.requires_grad_(), targets


def gate(logits: list[float]) -> list[float]:
    top = [math.exp(x) for x in logits]
    return [x / sum(top) for x in top]


def distance(target: list[float], output: list[float]) -> float:
    return sum((d - o) ** 2 for d, o in zip(target, output, strict=True))


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_is_the_equation_in_loops(name: str):
    outputs, logits, targets = case()
    found = ERRORS[name](outputs, logits, targets).tolist()
    for t in range(T):
        o, d, p = outputs[t].tolist(), targets[t].tolist(), gate(logits[t].tolist())
        if name == "blend":
            expected = distance(d, [sum(p[i] * o[i][c] for i in range(E)) for c in range(C)])
        elif name == "expected":
            expected = sum(p[i] * distance(d, o[i]) for i in range(E))
        else:
            expected = -math.log(sum(p[i] * math.exp(-distance(d, o[i]) / 2) for i in range(E)))
        assert found[t] == pytest.approx(expected, rel=1e-13)


def test_gradients_of_the_blend_couple_the_experts():
    outputs, logits, targets = case(1)
    of_o, of_x = torch.autograd.grad(blend_error(outputs, logits, targets).sum(), (outputs, logits))
    p = torch.softmax(logits, -1)
    blend = torch.einsum("te,tec->tc", p, outputs)
    residual = targets - blend
    torch.testing.assert_close(of_o, -2 * p.unsqueeze(-1) * residual.unsqueeze(1))
    # Every expert's share of the residual: dE/dx_i = -2 p_i (d - y).(o_i - y).
    pull = torch.einsum("tc,tec->te", residual, outputs - blend.unsqueeze(1))
    torch.testing.assert_close(of_x, -2 * p * pull)


def test_gradients_of_the_expectation_are_equation_1_4():
    outputs, logits, targets = case(2)
    error = expected_error(outputs, logits, targets)
    of_o, of_x = torch.autograd.grad(error.sum(), (outputs, logits))
    p, gap = torch.softmax(logits, -1), targets.unsqueeze(1) - outputs
    torch.testing.assert_close(of_o, -2 * p.unsqueeze(-1) * gap)
    torch.testing.assert_close(of_x, p * (gap.square().sum(-1) - error.unsqueeze(1)))


def test_gradients_of_the_mixture_are_equation_1_5_and_p_minus_h():
    outputs, logits, targets = case(3)
    of_o, of_x = torch.autograd.grad(mixture_error(outputs, logits, targets).sum(), (outputs, logits))
    p, h = torch.softmax(logits, -1), posteriors(outputs, logits, targets)
    gap = targets.unsqueeze(1) - outputs
    likelihood = p * (-gap.square().sum(-1) / 2).exp()
    torch.testing.assert_close(h, likelihood / likelihood.sum(-1, keepdim=True))
    torch.testing.assert_close(of_o, -h.unsqueeze(-1) * gap)
    torch.testing.assert_close(of_x, p - h)


def test_a_uniform_gate_moves_the_best_expert_least_in_1_2_and_most_in_1_3():
    # Distances 1.5 to 3 from the target: all errors above 1, as when training starts.
    outputs = torch.tensor([[[1.5], [2.0], [2.5], [3.0]]], dtype=torch.float64, requires_grad=True)
    logits, targets = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    moves = {
        name: torch.autograd.grad(ERRORS[name](outputs, logits, targets).sum(), outputs)[0].flatten().tolist()
        for name in ("expected", "mixture")
    }
    assert moves["expected"] == sorted(moves["expected"])
    assert moves["mixture"] == sorted(moves["mixture"], reverse=True)


def test_one_expert_has_half_the_squared_error():
    outputs, logits, targets = case(4)
    alone = mixture_error(outputs[:, :1], logits[:, :1], targets)
    torch.testing.assert_close(alone, (targets - outputs[:, 0]).square().sum(-1) / 2)


def test_far_targets_keep_their_error_and_gradient():
    outputs = torch.zeros(1, 2, 1, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(1, 2, dtype=torch.float64)
    error = mixture_error(outputs, logits, torch.full_like(outputs[:, 0], 100.0))
    assert error.item() == pytest.approx(5000)
    torch.testing.assert_close(torch.autograd.grad(error.sum(), outputs)[0], torch.full_like(outputs, -50.0))


@pytest.mark.parametrize("name", ERRORS)
def test_the_objective_adds_its_cases_up(name: str):
    outputs, logits, targets = case(5)
    loss = CaseError(name)(Output(outputs, logits), targets)
    assert loss.total.item() == pytest.approx(ERRORS[name](outputs, logits, targets).sum().item())
    assert (loss.balance.item(), loss.z.item()) == (0, 0)
    with pytest.raises(UserError, match="error 'mixtur' is unknown; did you mean 'mixture'"):
        CaseError("mixtur")
