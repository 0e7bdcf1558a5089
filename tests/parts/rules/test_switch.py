"""Switch: one expert, its score as weight, jitter on the router's input alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from gatewright.errors import UserError
from gatewright.parts import Capacity, MoELayer, RoutingCall, balance_loss, build_router
from gatewright.parts.draws import centred, fold
from gatewright.parts.noise import INPUT_NOISE
from tests.oracle.moe import best, dot, softmax
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same
from tests.parts.rules.noisy_cases import CPU, NoisyCase, draw_weights, noisy_cases, twin

LN3 = math.log(3)


def test_the_weight_is_the_score_by_hand():
    layer = MoELayer(2, 2, 1, 3, router="switch").double().eval()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    # softmax(ln 3, 0) = (3/4, 1/4), so that y is 3/4 of what the expert returns: never the whole.
    x = torch.tensor([[LN3, 0], [0, LN3]], dtype=torch.float64)
    _, stats = layer(x, capture=True)
    assert stats["router"].experts.tolist() == [[0], [1]]
    torch.testing.assert_close(stats["router"].combine_weights, torch.full((2, 1), 0.75).double())
    # f = P = (1/2, 1/2): E sum f P = 2 * (1/4 + 1/4) = 1.
    assert balance_loss(stats).item() == pytest.approx(1)


def test_jitter_moves_the_logits_by_1_percent_at_most():
    router = build_router("switch", 1, 2, 1).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[10.0], [-10.0]]))
    x = torch.ones(2000, 1, dtype=torch.float64)
    logits = router.route(x, RoutingCall(training=True, key=torch.tensor(1))).logits
    # 10 * U(.99, 1.01), and both logits of a token from the same jittered token.
    assert logits[:, 0].min() >= 9.9
    assert logits[:, 0].max() <= 10.1
    assert logits[:, 0].max() - logits[:, 0].min() > 0.19
    assert torch.equal(logits[:, 0], -logits[:, 1])
    assert torch.equal(router.route(x, RoutingCall()).logits[:, 0], torch.full((2000,), 10.0).double())


def test_the_router_learns_from_the_task_though_it_has_one_choice():
    layer = MoELayer(4, 3, 1, 3, router="switch")
    y, _ = layer(torch.randn(6, 4))
    y.sum().backward()
    assert layer.router.weight.grad.any()


def test_capacity_is_the_layers():
    assert build_router("switch", 4, 2, 1).capacity is None
    layer = MoELayer(4, 2, 1, 3, router="switch", capacity=Capacity(1.0, per_token=True))
    assert layer(torch.randn(6, 4))[1]["router"].kept.max() <= 3


@repeatable(200)
@given(case=noisy_cases())
def test_equals_the_oracle(case: NoisyCase):
    router = build_router("switch", 3, case.num_experts, 1, eps=0.3)
    draw_weights(router, case.seed)
    ours = [twin(case.x), router.weight]
    theirs = [twin(leaf) for leaf in ours]
    u = centred(fold(case.call.key, INPUT_NOISE), tuple(case.x.shape), CPU, torch.float64)
    choices = []
    for t in range(len(case.x)):
        seen = theirs[0][t] * (1 + 0.3 * u[t]) if case.training else theirs[0][t]
        scores = softmax([dot(row, seen) for row in theirs[1]])
        chosen = best(scores, 1)
        choices.append((chosen, [scores[e] for e in chosen]) if case.real(t) else ([], []))
    found = router.route(ours[0], case.call).assignment
    assert_same(found, choices, list(zip(ours, theirs, strict=True)))


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="router 'switch' with num_selected 2; allowed: 1"):
        build_router("switch", 8, 4, 2)
    with pytest.raises(UserError, match=r"eps 2.0; allowed: above 0, below 1"):
        build_router("switch", 8, 4, 1, eps=2.0)
    assert build_router("switch", 8, 4, 1, eps=None).noise is None
