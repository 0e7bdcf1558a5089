"""The mixture of 1991 as a model: sizes, the equations in loops, and the start that the paper describes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives.mixture import posteriors
from gatewright.papers import get_paper
from gatewright.parts import RoutingCall

FILE = get_paper("local_experts")
READING_B = {"num_outputs": 4, "squash": "softmax"}


def built(**changes: Any) -> Any:
    torch.manual_seed(0)
    return FILE.build(FILE.Settings(**changes)).double()


def cases(num_outputs: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(7, 2, generator=draw, dtype=torch.float64)
    return x, (torch.rand(7, num_outputs, generator=draw, dtype=torch.float64) > 0.5).double()


@pytest.mark.parametrize(
    ("name", "reading_a", "reading_b"),
    [
        ("local-experts-4", 24, 60),
        ("local-experts-8", 48, 120),
        ("back-propagation-6", 25, 46),
        ("back-propagation-12", 49, 88),
    ],
)
def test_the_nets_match_the_mixtures_in_parameters(name: str, reading_a: int, reading_b: int):
    settings = FILE.PUBLISHED[name]
    for own, expected in ((settings, reading_a), (replace(settings, **READING_B), reading_b)):
        assert sum(p.numel() for p in FILE.build(own).parameters()) == expected
    assert len(FILE.PUBLISHED) == 4


@pytest.mark.parametrize("squash", ["logistic", "softmax", "linear"])
def test_the_mixture_is_the_equations_in_loops(squash: str):
    model, (x, _) = built(num_experts=3, num_outputs=2, squash=squash, init=1.0, gate_init=1.0), cases()
    found = model(x)
    weight, bias = (p.tolist() for p in (model.experts.weight, model.experts.bias))
    gate_w, gate_b = (p.tolist() for p in (model.router.weight, model.router.bias))
    for t, case in enumerate(x.tolist()):
        exps = [
            math.exp(sum(w * v for w, v in zip(gate_w[e], case, strict=True)) + gate_b[e]) for e in range(3)
        ]
        blend = [0.0, 0.0]
        for e in range(3):
            sums = [
                sum(w * v for w, v in zip(weight[e][c], case, strict=True)) + bias[e][c] for c in range(2)
            ]
            told = {
                "linear": sums,
                "logistic": [1 / (1 + math.exp(-s)) for s in sums],
                "softmax": [math.exp(s) / sum(map(math.exp, sums)) for s in sums],
            }[squash]
            assert found.outputs[t, e].tolist() == pytest.approx(told, rel=1e-12)
            blend = [b + exps[e] / sum(exps) * o for b, o in zip(blend, told, strict=True)]
        assert found.blend[t].tolist() == pytest.approx(blend, rel=1e-12)


def test_the_gate_is_the_router_named_dense():
    model, (x, _) = built(num_experts=5, gate_init=1.0), cases()
    assignment = model.router.route(x, RoutingCall()).assignment
    chosen = torch.zeros(7, 5, dtype=torch.float64).scatter(1, assignment.experts, assignment.weights)
    blend = torch.einsum("te,tec->tc", chosen, model(x).outputs)
    torch.testing.assert_close(model(x).blend, blend)


def test_every_expert_starts_with_an_equal_share_and_a_line_of_its_own():
    model, (x, _) = built(num_experts=8), cases()
    assert torch.equal(torch.softmax(model(x).logits, -1), torch.full((7, 8), 0.125, dtype=torch.float64))
    assert len({tuple(w) for w in model.experts.weight.flatten(1).tolist()}) == 8
    assert float(model.experts.weight.detach().abs().max()) <= 0.1 + 1e-8


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, READING_B, {**READING_B, "num_experts": 0}])
def test_steps_down_the_gradient_lower_the_error(changes: dict[str, Any]):
    settings = FILE.Settings(**changes)
    model, (x, d) = built(**changes), cases(settings.num_outputs)
    objective, errors = FILE.objective(settings), []
    for _ in range(20):
        error = objective(model(x), d).total
        errors.append(error.item())
        for p, g in zip(
            model.parameters(), torch.autograd.grad(error, list(model.parameters())), strict=True
        ):
            p.data -= 0.05 * g
    assert errors == sorted(errors, reverse=True)


def test_the_gate_learns_by_p_minus_h():
    model, (x, d) = built(gate_init=1.0, init=1.0), cases()
    output = model(x)
    FILE.objective(FILE.Settings())(output, d).total.backward()
    p, h = torch.softmax(output.logits, -1), posteriors(output.outputs, output.logits, d)
    torch.testing.assert_close(model.router.bias.grad, (p - h).sum(0))
    torch.testing.assert_close(model.router.weight.grad, (p - h).t() @ x)


def test_one_net_has_a_logistic_hidden_layer_and_half_the_squared_error():
    model, (x, d) = built(num_experts=0, hidden_width=3, init=1.0), cases()
    hidden = torch.sigmoid(x @ model.hidden.weight.t() + model.hidden.bias)
    y = torch.sigmoid(hidden @ model.output.weight.t() + model.output.bias)
    torch.testing.assert_close(model(x).blend, y)
    error = FILE.objective(FILE.Settings())(model(x), d).total
    torch.testing.assert_close(error, (d - y).square().sum() / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": -1}, "num_experts -1; allowed: 0 or more"),
        ({"num_outputs": 0}, "num_outputs 0; allowed: 1 or more"),
        ({"num_experts": 0, "hidden_width": 0}, "hidden_width 0"),
        ({"squash": "logistics"}, "squash 'logistics' is unknown; did you mean 'logistic'"),
        ({"init": 0.0}, "init 0.0; allowed: above 0"),
        ({"num_experts": 0, "init": -1.0}, "init -1.0; allowed: above 0"),
        ({"gate_init": -1.0}, "gate_init -1.0; allowed: 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        built(**changes)
