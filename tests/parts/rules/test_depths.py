"""Mixture-of-Depths: the sheet of numbers worked by hand, causal choices, the slow rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, Stats, build_router
from gatewright.parts.rules.depths import MixtureOfDepths
from tests.oracle import depths as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, leaves

LOGITS = [0.2, -0.5, 1.0, 0.1]


class Tenfold(nn.Module):
    """Experts that give 10 x, through the plan and the weights that they are handed."""

    def forward(self, x: Tensor, plan: object, combine_weights: Tensor, backend: object = None) -> Tensor:
        return 10 * x * combine_weights


def routed(training: bool, share: float = 0.5, **call: object):
    """Return (the assignment, the logits) of the four tokens."""
    logits = torch.tensor(LOGITS, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    rule = MixtureOfDepths(share)
    return rule(logits, logits, RoutingCall(training=training, **call)), logits  # type: ignore[arg-type]


def test_the_top_tokens_pass_at_their_logits():
    # C = 0.5 * 4 = 2: t2 (1.0) and t0 (.2).
    chosen, _ = routed(True)
    assert chosen.experts.flatten().tolist() == [0, -1, 0, -1]
    assert chosen.weights.flatten().tolist() == [0.2, 0, 1.0, 0]


def test_a_block_adds_r_f_of_x_to_those_that_pass():
    # f(x) = 10 x on x = 1, 2, 3, 4: y = 1 + .2 * 10 = 3, 2, 3 + 1 * 30 = 33, 4.
    router = build_router("mixture_of_depths", 1, 1, 1, capacity_share=0.5)
    router.forward = lambda x: torch.tensor(LOGITS).unsqueeze(-1)  # type: ignore[method-assign]
    layer = MoELayer(1, 1, 1, 1, router=router, experts=Tenfold())
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y, stats = layer(x)
    assert (x + y).flatten().tolist() == pytest.approx([3, 2, 33, 4])
    assert isinstance(stats, Stats)
    assert int(stats["router"].unrouted) == 2
    # r > 0: t0, t2 and t3, three tokens: 4 + .1 * 40 = 8.
    y, _ = layer.eval()(x)
    assert (x + y).flatten().tolist() == pytest.approx([3, 2, 33, 8])


def test_evaluation_looks_at_the_sign_alone():
    chosen, _ = routed(False)
    assert chosen.experts.flatten().tolist() == [0, -1, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_the_cross_entropy_and_its_gradient_by_hand(training):
    # Targets 1, 0, 1, 0: ln(1 + e^-.2) + ln(1 + e^-.5) + ln(1 + e^-1) + ln(1 + e^.1)
    # = .598 + .474 + .313 + .744 = 4 * .5325.
    chosen, logits = routed(training)
    total = chosen.sums["depth"]
    assert total.item() == pytest.approx(4 * 0.5325, abs=1e-3)
    total.backward()
    # d = sigmoid(r) - target.
    expected = [1 / (1 + math.exp(-r)) - target for r, target in zip(LOGITS, (1, 0, 1, 0), strict=True)]
    assert logits.grad.flatten().tolist() == pytest.approx(expected)


def test_learning_the_cross_entropy_makes_the_sign_choose_as_the_top():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=draw)
    router = build_router("mixture_of_depths", 4, 1, 1, capacity_share=0.25)
    router.bias = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD(router.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        router.route(x, RoutingCall(training=True)).assignment.sums["depth"].backward()
        optimizer.step()
    top = router.route(x, RoutingCall(training=True)).assignment.experts
    sign = router.route(x, RoutingCall()).assignment.experts
    assert (top == 0).sum() == 16
    assert (top != sign).sum() <= 3


def test_the_share_is_rounded_up_counts_real_tokens_and_ties_go_to_the_first():
    rule = MixtureOfDepths(0.125)
    same = torch.ones(9, 1)
    # ceil(9 / 8) = 2.
    assert rule(same, same, RoutingCall(training=True)).experts.flatten().tolist() == [0, 0] + [-1] * 7
    mask = torch.arange(9) > 0
    chosen = rule(same, same, RoutingCall(mask=mask, training=True))
    assert chosen.experts.flatten().tolist() == [-1, 0] + [-1] * 7
    assert chosen.sums["depth"].item() == pytest.approx(math.log1p(math.e) * 7 + math.log1p(1 / math.e))
    assert rule(same, same, RoutingCall(mask=mask)).experts.flatten().tolist() == [-1] + [0] * 8
    # Sequences of 3 are groups of their own.
    grouped = rule(same, same, RoutingCall(training=True, group_size=3))
    assert grouped.experts.flatten().tolist() == [0, -1, -1] * 3


@repeatable(200)
@given(st.data())
def test_it_is_the_slow_rule_in_choice_weight_sum_and_gradient(data: st.DataObject):
    num_tokens = data.draw(st.integers(0, 8))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    logits = torch.randn(num_tokens, 1, generator=draw, dtype=torch.float64)
    if data.draw(st.booleans()):
        logits = (2 * logits).round()
    mask = torch.rand(num_tokens, generator=draw) < 0.7 if data.draw(st.booleans()) else None
    share = data.draw(st.sampled_from((0.1, 0.125, 0.5, 1.0)))
    group_size, training = data.draw(st.none() | st.integers(1, 8)), data.draw(st.booleans())
    mine, slow = leaves(logits)
    call = RoutingCall(mask=mask, training=training, group_size=group_size)
    found = MixtureOfDepths(share)(mine, mine, call)
    real = [True] * num_tokens if mask is None else mask.tolist()
    expected, total = oracle.route([row[0] for row in slow], real, share, group_size, training)
    total = slow.sum() * 0 + total
    assert_same(found, expected, [(mine, slow)], [(found.sums["depth"], total)])


@pytest.mark.parametrize("share", [0.0, 1.5, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(UserError, match=r"capacity_share .*; allowed: above 0, up to 1"):
        build_router("mixture_of_depths", 3, 1, 1, capacity_share=share)


def test_more_than_one_expert_is_refused():
    with pytest.raises(UserError, match="mixture_of_depths with num_experts 4; allowed: 1"):
        build_router("mixture_of_depths", 3, 4, 1)
