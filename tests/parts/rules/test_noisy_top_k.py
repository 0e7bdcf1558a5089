"""Noisy top-K: gates that sum to 1 over the K highest noisy logits, importance and load."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.backbones import initialise
from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router
from gatewright.parts.draws import fold, normal
from gatewright.parts.noise import LOGIT_NOISE
from gatewright.parts.variation import importance_loss, load_loss
from tests.oracle import noise as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same
from tests.parts.rules.noisy_cases import CPU, NoisyCase, add, draw_weights, noisy_cases, twin

LN2 = math.log(2)


def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every draw of noise be 0, its expected value."""
    monkeypatch.setattr("gatewright.parts.noise.normal", lambda key, shape, *_: torch.zeros(shape).double())


def test_gates_importance_and_load_by_hand(monkeypatch: pytest.MonkeyPatch):
    still(monkeypatch)
    router = build_router("noisy_top_k", 3, 3, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    # Logits (ln 2, 0, -ln 2): e^. = 2, 1, 1/2; the first two keep 2/3 and 1/3. The other token: 1/3, 2/3.
    x = torch.tensor([[LN2, 0, -LN2], [-LN2, 0, LN2]], dtype=torch.float64)
    routed = router.route(x, RoutingCall(training=True, key=torch.tensor(0)))
    assert routed.assignment.experts.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(routed.assignment.weights, torch.tensor([[2 / 3, 1 / 3]] * 2).double())
    sums = routed.assignment.sums
    torch.testing.assert_close(sums["importance"], torch.tensor([2 / 3, 2 / 3, 2 / 3]).double())
    # Standard deviation ln 2. Second best of the others: -ln 2, -ln 2, 0, so z = 2, 1, -1:
    # Phi = .97725, .84134, .15866; the other token has them the other way round.
    expected = torch.tensor([0.97725 + 0.15866, 2 * 0.84134, 0.15866 + 0.97725]).double()
    torch.testing.assert_close(sums["load"], expected, rtol=0, atol=2e-5)


def test_losses_of_2017_take_the_routers_sums(monkeypatch: pytest.MonkeyPatch):
    still(monkeypatch)
    layer = MoELayer(3, 3, 2, 2, router=build_router("noisy_top_k", 3, 3, 2)).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    _, stats = layer(torch.tensor([[LN2, 0, -LN2]], dtype=torch.float64))
    # Importance (2/3, 1/3, 0): mean 1/3, variance (1/9 + 0 + 1/9) / 3 = 2/27, CV^2 = 2/27 * 9 = 2/3.
    assert importance_loss(stats).item() == pytest.approx(2 / 3)
    # Load (.97725, .84134, .15866): mean .65908, squared 0.43439; mean square .56268 - .43439 = .12829.
    assert load_loss(stats).item() == pytest.approx(0.12829 / 0.43439, abs=1e-4)
    for loss in (importance_loss(stats), load_loss(stats)):
        layer.zero_grad()
        loss.backward(retain_graph=True)
        assert layer.router.weight.grad.any()
    assert layer.router.noise.weight.grad.any()


def test_zero_weights_route_uniformly_at_random():
    num_tokens, num_experts, num_selected = 4096, 8, 2
    layer = MoELayer(5, num_experts, num_selected, 3, router="noisy_top_k")
    assert not layer.router.weight.any()
    assert not layer.router.noise.weight.any()
    _, stats = layer(torch.randn(num_tokens, 5), key=torch.tensor(1))
    mean = num_selected * num_tokens / num_experts
    record = stats["router"]
    # A count is binomial at most: standard deviation sqrt(T K/E (1 - K/E)) = 27.7.
    assert ((record.counts - mean).abs() < 4 * 27.7).all()
    assert ((record.sums["load"] - mean).abs() < 4 * 27.7).all()
    assert ((record.sums["importance"] - num_tokens / num_experts).abs() < 4 * 27.7).all()
    # The probabilities add up to K in expectation only.
    assert record.sums["load"].sum().item() == pytest.approx(num_selected * num_tokens, rel=0.02)
    # Without noise all logits tie, and the first experts have every token.
    _, quiet = layer.eval()(torch.randn(num_tokens, 5))
    assert quiet["router"].counts.tolist() == [num_tokens, num_tokens, *[0] * 6]


def test_a_backbones_initialisation_leaves_zeros_where_they_are_wanted():
    for zero_init in (True, False):
        layer = MoELayer(6, 8, 2, 3, router=build_router("noisy_top_k", 6, 8, 2, zero_init=zero_init))
        initialise.fan_in(layer)
        assert bool(layer.router.weight.any()) is not zero_init
        assert not layer.router.noise.weight.any()


def test_without_zero_init_it_starts_as_any_router():
    router = build_router("noisy_top_k", 64, 8, 2, zero_init=False)
    assert router.weight.std().item() == pytest.approx(1 / 8, rel=0.2)
    assert not router.noise.weight.any()
    router.reset_parameters(0.5)
    assert router.weight.std().item() == pytest.approx(0.5, rel=0.2)


def expected(
    case: NoisyCase, leaves: list[Tensor], epsilon: float
) -> tuple[list, list[Tensor], list[Tensor]]:
    """Return the oracle's choices, importance and load."""
    x, gate, spread = leaves
    lots = normal(fold(case.call.key, LOGIT_NOISE), (len(x), case.num_experts), CPU, torch.float64)
    choices = []
    importance = load = [x.sum() * 0] * case.num_experts
    for t in range(len(x)):
        if not case.real(t):
            choices.append(([], []))
            continue
        clean, noisy, stds = oracle.noisy_logits(x[t], gate, spread, lots[t], epsilon)
        chosen, gates = oracle.keep_top_k(noisy if case.training else clean, case.num_selected)
        choices.append((chosen, gates))
        by_expert = dict(zip(chosen, gates, strict=True))
        importance = add(importance, [by_expert.get(e, x.sum() * 0) for e in range(case.num_experts)])
        load = add(load, oracle.load(clean, noisy, stds, case.num_selected, excluding=True))
    return choices, importance, load


@repeatable(200)
@given(case=noisy_cases(), epsilon=st.sampled_from((0.0, 0.01)))
def test_equals_the_oracle(case: NoisyCase, epsilon: float):
    router = build_router("noisy_top_k", 3, case.num_experts, case.num_selected, epsilon=epsilon)
    draw_weights(router, case.seed)
    ours = [twin(case.x), router.weight, router.noise.weight]
    theirs = [twin(leaf) for leaf in ours]
    choices, importance, load = expected(case, theirs, epsilon)
    found = router.route(ours[0], case.call).assignment
    wanted = {"importance": importance, "load": load} if case.training else {}
    assert found.sums.keys() == wanted.keys()
    sums = [(found.sums[name], torch.stack(values)) for name, values in wanted.items()]
    assert_same(found, choices, list(zip(ours, theirs, strict=True)), sums)


def test_gates_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="makes every gate exactly 1"):
        build_router("noisy_top_k", 8, 4, 1)
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4"):
        build_router("noisy_top_k", 8, 4, 5)
    with pytest.raises(UserError, match=r"epsilon -1.0; allowed"):
        build_router("noisy_top_k", 8, 4, 2, epsilon=-1.0)
