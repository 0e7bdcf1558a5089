"""Experts and MLP: biases, initialisation, dropout, and the layer's own arguments for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from gatewright.errors import UserError
from gatewright.kernels import runnable_backends
from gatewright.parts import MLP, Assignment, Experts, MoELayer, make_plan
from gatewright.parts.draws import fold, uniform, uniform_rows
from tests.kernels.test_variants import near
from tests.oracle.experts import biased_feed_forward, mixture
from tests.parts.harness import repeatable

KEY = torch.tensor(11)


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return the module in fp64, every parameter drawn: biases too."""
    draw = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    return module


def chosen(places: list[list[int]], num_experts: int, seed: int = 1) -> Assignment:
    """Return an assignment with drawn weights that carry a gradient."""
    experts = torch.tensor(places, dtype=torch.int64).reshape(len(places), len(places[0]) if places else 1)
    weights = torch.rand(experts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Assignment(experts, weights.requires_grad_(), num_experts)


def test_names_and_shapes_of_biases():
    gated = dict(Experts(4, 3, 5, bias=True).named_parameters())
    assert {name: tuple(p.shape) for name, p in gated.items()} == {
        "w_gate_up": (3, 10, 4),
        "b_gate_up": (3, 10),
        "w_down": (3, 4, 5),
        "b_down": (3, 4),
    }
    plain = Experts(4, 3, 5, "relu", bias=True)
    assert set(dict(plain.named_parameters())) == {"w_up", "b_up", "w_down", "b_down"}
    assert plain.b_in is plain.b_up
    # Without biases a checkpoint holds what it always held.
    assert set(Experts(4, 3, 5).state_dict()) == {"w_gate_up", "w_down"}
    assert set(MLP(4, 3).state_dict()) == {"w_in", "w_down"}


def test_biases_of_an_mlp_by_hand():
    # x = 2: hidden relu(3 * 2 - 1) = 5, out 4 * 5 + 7 = 27.
    mlp = MLP(1, 1, "relu", bias=True)
    assert mlp.b_in is not None
    assert mlp.b_down is not None
    with torch.no_grad():
        for parameter, value in ((mlp.w_in, 3.0), (mlp.b_in, -1.0), (mlp.w_down, 4.0), (mlp.b_down, 7.0)):
            parameter.fill_(value)
    assert mlp(torch.tensor([[2.0]])).item() == 27.0


@pytest.mark.parametrize("build", [lambda s: Experts(256, 4, 64, init_scale=s), lambda s: MLP(256, 64)])
def test_biases_start_at_zero_and_weights_by_fan_in(build):
    module = build(1.0)
    assert module.w_in.std().item() == pytest.approx(0.88 / 16, rel=0.05)  # cut at 2 std: 0.88 of it
    for one in (Experts(8, 2, 4, bias=True), MLP(8, 4, bias=True)):
        assert (one.b_in == 0).all()
        assert (one.b_down == 0).all()


def test_switchs_initialisation_is_a_tenth_of_the_variance():
    # Switch section 2.4: std sqrt(0.1 / fan_in); fan_in is 256 and 64, the draw is cut at 2 std.
    torch.manual_seed(0)
    experts = Experts(256, 8, 64, init_scale=0.1)
    for weight, fan_in in ((experts.w_in, 256), (experts.w_down, 64)):
        std = math.sqrt(0.1 / fan_in)
        assert weight.abs().max().item() <= 2 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"expert_dropout 1.0; allowed: 0 or more and below 1"):
        Experts(4, 2, 4, dropout=1.0)
    with pytest.raises(UserError, match=r"init_scale 0.0; allowed: above 0"):
        Experts(4, 2, 4, init_scale=0.0)
    with pytest.raises(UserError, match=r"init_scale -1.0; allowed: above 0"):
        MLP(4, 2, init_scale=-1.0)


def test_a_row_of_numbers_depends_on_the_key_and_its_own_number_alone():
    rows = torch.tensor([3, 0, 2**40, 3])
    found = uniform_rows(KEY, rows, 5)
    for row, number in zip(found, rows.tolist(), strict=True):
        assert torch.equal(row, uniform(fold(KEY, number), (5,), torch.device("cpu")))


@pytest.mark.parametrize("backend", runnable_backends())
def test_dropout_by_its_definition(backend: str):
    # Row (token t, expert e) keeps what uniform(fold(key, "drop", t E + e)) >= p says, over 1 - p.
    experts = filled(Experts(4, 3, 6, "gelu", bias=True, dropout=0.4))
    assignment = chosen([[0, 2], [2, 1], [-1, 0]], 3)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    own = fold(KEY, 0x64726F70)
    scales = {
        (t, e): (uniform(fold(own, t * 3 + e), (6,), torch.device("cpu")) >= 0.4).double() / 0.6
        for t, row in enumerate(assignment.experts.tolist())
        for e in row
        if e >= 0
    }
    assert {value for scale in scales.values() for value in scale.tolist()} == {0.0, 1 / 0.6}
    for static in (False, True):
        plan = make_plan(assignment, static=static)
        y = experts(x, plan, assignment.weights, backend, key=KEY)
        expected = mixture(
            x, assignment.experts.tolist(), assignment.weights, experts.w_in, experts.w_down, "gelu",
            b_in=experts.b_in, b_down=experts.b_down, scales=scales,
        )  # fmt: skip
        near(y, expected, 1e-12)
        leaves = [x, assignment.weights, *experts.parameters()]
        for one, other in zip(
            torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            near(one, other, 1e-12)


def test_dropout_is_for_training_and_its_mean_is_what_it_replaces():
    experts = Experts(8, 1, 512, "linear", dropout=0.25).double()
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assignment = Assignment(torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1), 1)
    plan = make_plan(assignment)
    with torch.no_grad():
        experts.w_in.fill_(1 / 8)
        experts.w_down.fill_(1 / 512)
        dropped = experts(x, plan, assignment.weights, key=KEY)
        plain = experts.eval()(x, plan, assignment.weights, key=KEY)
    torch.testing.assert_close(plain[:, 0], x.mean(dim=1), rtol=1e-12, atol=1e-13)
    # A share of 3 in 4 over 3/4: y is x's mean times 1 +- sqrt(1/3 / 512) = 2.6 %.
    ratio = dropped[:, 0] / plain[:, 0]
    assert 0.01 < ratio.std().item() < 0.05
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.01)


def test_dropout_repeats_with_its_key_and_under_recomputation():
    layer = MoELayer(6, 4, 2, 8, expert_dropout=0.5).double()
    x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    one, other, third = (layer(x, key=torch.tensor(k))[0] for k in (1, 1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    for key in (KEY, None):
        grads = []
        for again in (False, True):
            torch.manual_seed(3)
            layer.zero_grad()
            run = lambda given: layer(given, key=key)[0].square().sum()  # noqa: E731, B023
            (checkpoint(run, x, use_reentrant=False) if again else run(x)).backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_layer_hands_its_settings_on():
    layer = MoELayer(4, 3, 2, 5, num_shared_experts=1, expert_bias=True, expert_dropout=0.1, init_scale=0.1)
    assert layer.experts.b_in is not None
    assert (layer.experts.dropout, layer.experts.init_scale, layer.shared.init_scale) == (0.1, 0.1, 0.1)
    assert layer.shared.b_down is not None


def test_padding_gives_zero_although_the_shared_expert_has_a_bias():
    layer = filled(MoELayer(4, 3, 2, 5, num_shared_experts=1, expert_bias=True))
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1] = math.nan
    y, _ = layer(x, torch.tensor([True, False, True]))
    assert (y[1] == 0).all()
    assert torch.isfinite(y).all()
    alone = layer(x[[0, 2]])[0]
    torch.testing.assert_close(y[[0, 2]], alone, rtol=1e-13, atol=1e-14)


@given(seed=st.integers(0, 10_000), activation=st.sampled_from(("linear", "clamped_swiglu", "relu")))
@repeatable(30)
def test_a_biased_mlp_equals_the_oracle(seed: int, activation: str):
    mlp = filled(MLP(3, 4, activation, bias=True), seed)
    x = 5 * torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = [biased_feed_forward(row, mlp.w_in, mlp.w_down, activation, mlp.b_in, mlp.b_down) for row in x]
    near(mlp(x), torch.stack(expected), 1e-12)
