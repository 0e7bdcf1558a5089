"""The deep mixture of 2013 as a model: sizes, the equations in loops, both phases, the arms of table 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.papers import get_paper
from gatewright.parts import HiddenGate, RoutingCall
from tests.oracle.restraint import restrained

FILE = get_paper("deep_moe")
SMALL: dict[str, Any] = {
    "width": 6,
    "num_experts": (3, 2),
    "expert_width": (4, 5),
    "gate_width": (3, 2),
    "num_classes": 3,
}


def built(**changes: Any) -> Any:
    torch.manual_seed(0)
    return FILE.build(FILE.Settings(**{**SMALL, **changes})).double()


def cases(rows: int = 9) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def affine(weight: Tensor, bias: Tensor, x: list[float]) -> list[float]:
    pairs = zip(weight.tolist(), bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in pairs]


def relu(x: list[float]) -> list[float]:
    return [max(v, 0.0) for v in x]


def softmax(x: list[float]) -> list[float]:
    return [math.exp(v) / sum(math.exp(u) for u in x) for v in x]


def shake(model: Any) -> None:
    """Give every weight, biases too, a value that matters."""
    draw = torch.Generator().manual_seed(7)
    for own in model.parameters():
        own.data = 0.7 * torch.randn(own.shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "parameters", "plain"),
    [
        # f1 4 (1296 x 100 + 100), g1 1296 x 50 + 50 + 50 x 4 + 4, f2 4 (100 x 100 + 100), g2, f3.
        ("deep-moe-100-100-gates-50-50", 518_800 + 65_054 + 40_400 + 5_254 + 1_010, 451),
        ("deep-moe-100-20-gates-50-50", 518_800 + 65_054 + 8_080 + 5_254 + 210, 453),
        ("deep-moe-100-20-gates-50-20", 518_800 + 65_054 + 8_080 + 2_104 + 210, 451),
        ("deep-moe-50-20-gates-20-20", 259_400 + 26_024 + 4_080 + 1_104 + 210, 221),
        ("deep-moe-100-gate-50", 518_800 + 65_054 + 1_010, None),
        ("deep-moe-speech", 4 * (440 * 128 + 128) + 28_484 + 16 * (128 * 128 + 128) + 9_296 + 5_160, None),
        ("deep-moe-speech-one-layer", 4 * (440 * 128 + 128) + 28_484 + 5_160, None),
    ],
)
def test_published_sizes_have_their_weights_and_a_plain_twin(name: str, parameters: int, plain: int | None):
    settings = FILE.PUBLISHED[name]
    assert FILE.parameters(settings) == parameters
    if plain is not None:
        twin = FILE.plain_twin(settings)
        assert twin.expert_width == (plain, settings.expert_width[1])
        assert FILE.parameters(twin) == pytest.approx(parameters, rel=2e-3)


def test_every_published_size_is_checked():
    assert len(FILE.PUBLISHED) == 7


@pytest.mark.parametrize("restrain", [False, True])
def test_the_model_is_the_equations_in_loops(restrain: bool):
    model, x = built(), cases()
    shake(model)
    totals = [[0.0] * 3, [0.0] * 2]
    output = model(x, model.begin(), 0.4) if restrain else model(x)
    for t, case in enumerate(x.tolist()):
        for place, layer in enumerate(model.layers):
            gate = layer.gate
            scores = affine(
                gate.router.weight, gate.router.bias, relu(affine(gate.hidden.weight, gate.hidden.bias, case))
            )
            shares = softmax(scores)
            if restrain:
                (shares,), totals[place] = restrained([scores], totals[place], 0.4)
            assert output.gates[place][t].tolist() == pytest.approx(shares, rel=1e-10)
            hidden = [
                relu(affine(w, b, case))
                for w, b in zip(layer.experts.weight, layer.experts.bias, strict=True)
            ]
            # What goes on is the blend: the second gate and the second experts never see x.
            case = [sum(g * h[c] for g, h in zip(shares, hidden, strict=True)) for c in range(len(hidden[0]))]
        assert output.logits[t].tolist() == pytest.approx(affine(model.head.weight, model.head.bias, case))
    if restrain:
        for own, expected in zip(output.totals, totals, strict=True):
            assert own.tolist() == pytest.approx(expected)
        assert any((own == 0).any() for own in output.gates), "nobody was left out"
    else:
        assert output.totals == ()


def test_the_first_phase_goes_on_over_batches_and_the_second_forgets_nothing():
    model, x = built(), cases(12)
    shake(model)
    whole = model(x, model.begin(), 0.4)
    totals, gates = model.begin(), []
    for rows in x.split(5):
        output = model(rows, totals, 0.4)
        totals = output.totals
        gates.append(output.gates[1])
    torch.testing.assert_close(torch.cat(gates), whole.gates[1])
    torch.testing.assert_close(totals[0], whole.totals[0])
    by_batch = model(x, whole.totals, 0.4, batched=True)
    assert all(len(set(map(tuple, (own == 0).tolist()))) == 1 for own in by_batch.gates)
    # Lifting it changes no weight: the gates are those of the plain softmax again.
    assert all(bool((own > 0).all()) for own in model(x).gates)


def test_arms_differ_in_the_last_layer_alone():
    x = cases()
    tops = {top: built(top=top) for top in ("mixture", "single", "concat", "plain")}
    assert [len(tops[top](x).gates) for top in tops] == [2, 1, 1, 0]
    single, concat, plain = (tops[top] for top in ("single", "concat", "plain"))
    assert [own.experts.weight.shape[0] for own in single.layers] == [3, 1]
    assert concat.head.weight.shape == (3, 2 * 5)
    assert [tuple(own.experts.weight.shape) for own in plain.layers] == [(1, 4, 6), (1, 5, 4)]
    for model in tops.values():
        shake(model)
    z1 = torch.relu(x @ plain.layers[0].experts.weight[0].t() + plain.layers[0].experts.bias[0])
    z2 = torch.relu(z1 @ plain.layers[1].experts.weight[0].t() + plain.layers[1].experts.bias[0])
    torch.testing.assert_close(plain(x).logits, z2 @ plain.head.weight.t() + plain.head.bias)
    # Side by side: one expert after the other.
    z1 = concat.layers[0].blend(x, concat(x).gates[0])
    hidden = torch.cat(
        [torch.relu(z1 @ w.t() + b) for w, b in zip(*concat.layers[1].experts.parameters(), strict=True)], 1
    )
    torch.testing.assert_close(concat(x).logits, hidden @ concat.head.weight.t() + concat.head.bias)


def test_the_gate_is_the_router_named_dense_over_a_hidden_layer():
    gate, x = HiddenGate(6, 4, 5).double(), cases()
    routed = gate.router.route(torch.relu(gate.hidden(x)), RoutingCall()).assignment
    shares = torch.zeros(9, 5, dtype=torch.float64).scatter(1, routed.experts, routed.weights)
    torch.testing.assert_close(shares, torch.softmax(gate(x), -1))


def test_steps_down_the_gradient_lower_the_loss_in_both_phases():
    for margin in (None, 2.0):
        model, x = built(), cases(30)
        label = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        objective, losses = FILE.objective(FILE.Settings()), []
        for _ in range(20):
            loss = objective(model(x, None if margin is None else model.begin(), margin or 0.0), label).total
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            assert all(bool(g.abs().sum() > 0) for g in gradients)
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.data -= 0.3 * g
        assert losses[-1] < 0.9 * losses[0]
        expected = -torch.log_softmax(model(x).logits, -1)[range(30), label].mean()
        torch.testing.assert_close(objective(model(x), label).task, expected)


def test_first_weights_have_the_variance_of_their_fan_in_and_biases_are_0():
    model = FILE.build(replace(FILE.Settings(), init_scale=2.0))
    for name, own in model.named_parameters():
        if name.endswith("bias"):
            assert not own.any()
        elif own.numel() > 500:
            assert float(own.detach().var()) == pytest.approx(2 / own.shape[-1], rel=0.12), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_width": (4,)}, "for 2, 1, 2 layers; allowed: a number for each layer"),
        ({"num_experts": (), "expert_width": (), "gate_width": ()}, "for 0, 0, 0 layers"),
        ({"gate_width": (3, 0)}, r"gate_width \[3, 0\]"),
        ({"num_experts": (0, 2)}, "num_experts 0, .* allowed: 1 or more"),
        ({"num_classes": 0}, "num_classes 0; allowed: 1 or more"),
        ({"top": "concatenated"}, "top 'concatenated' is unknown; did you mean 'concat'"),
        ({"init_scale": 0.0}, "init_scale 0.0; allowed: above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        built(**changes)


def test_a_plain_twin_needs_two_layers():
    with pytest.raises(UserError, match="allowed: 2 layers"):
        FILE.plain_twin(FILE.PUBLISHED["deep-moe-100-gate-50"])
