"""Top-p: as many experts as it takes, and the entropy that keeps them few."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router
from gatewright.parts.rules.registry import router_info
from gatewright.parts.rules.top_p import TopP
from tests.oracle import top_p as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens

P1, P2 = [0.7, 0.2, 0.08, 0.02], [0.3, 0.28, 0.22, 0.2]


def test_a_sure_token_takes_few_experts_and_an_unsure_one_more():
    scores = torch.tensor([P1, P2], dtype=torch.float64)
    # p = .4: .7 is enough; .3 is not, .3 + .28 = .58 is.
    chosen = TopP(0.4)(scores.log(), scores, call_of())
    assert chosen.experts.tolist() == [[0, -1], [0, 1]]
    assert chosen.weights.tolist() == [[0.7, 0.0], [0.3, 0.28]]
    # p = .75: .7 + .2 = .9; .3 + .28 = .58, + .22 = .80.
    chosen = TopP(0.75)(scores.log(), scores, call_of())
    assert chosen.experts.tolist() == [[0, 1, -1], [0, 1, 2]]


def test_entropy_by_hand():
    # H(P1) = .7 ln(1/.7) + .2 ln 5 + .08 ln 12.5 + .02 ln 50 = .2497 + .3219 + .2021 + .0782 = .8519.
    scores = torch.tensor([P1, P2, [0.25] * 4], dtype=torch.float64)
    each = [TopP(0.4)(row.log(), row, call_of()).sums["entropy"].item() for row in scores.split(1)]
    assert each == pytest.approx([0.8519, 1.3726, math.log(4)], abs=5e-5)
    both = TopP(0.4)(scores.log(), scores, call_of(torch.tensor([True, True, False])))
    assert both.sums["entropy"].item() / 2 == pytest.approx(1.1122, abs=5e-5)


def test_a_sum_of_p_exactly_is_enough():
    # Binary fractions, so that the sums are exact: .5, .75, .875, 1.
    scores = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    counts = {0.5: [1], 0.51: [1, 3], 0.75: [1, 3], 0.875: [1, 3, 0], 0.9: [1, 3, 0, 2], 1.0: [1, 3, 0, 2]}
    for p, expected in counts.items():
        assert TopP(p)(scores.log(), scores, call_of()).experts.tolist() == [expected], p


def test_a_uniform_router_takes_the_ceiling_of_p_times_e():
    # E = 16, p = .4: 6 / 16 = .375 < .4 <= 7 / 16.
    scores = torch.full((1, 16), 1 / 16)
    assert TopP(0.4)(scores.log(), scores, call_of()).experts.tolist() == [list(range(7))]


def test_at_most_caps_the_number_and_not_the_probability():
    scores = torch.full((1, 16), 1 / 16)
    assert TopP(0.4, at_most=3)(scores.log(), scores, call_of()).experts.tolist() == [[0, 1, 2]]
    # The layer's K is the cap; a router without one takes E.
    assert build_router("top_p", 8, 4, 2).rule.at_most == 2
    assert router_info("top_p").make(8, 4, None, p=0.9).rule.at_most is None


def test_an_impossible_expert_leaves_the_gradient_finite():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    chosen = TopP(1.0)(logits, torch.softmax(logits, -1), call_of())
    (gradient,) = torch.autograd.grad(chosen.sums["entropy"] + chosen.weights.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_the_layer_counts_what_each_token_takes():
    # Logits are x: softmax(ln 8, 0, 0) = (.8, .1, .1), one expert at p = .75; equal logits: all three.
    layer = MoELayer(3, 3, 3, 2, router=build_router("top_p", 3, 3, 3, p=0.75)).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    _, stats = layer(torch.tensor([[math.log(8), 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    assert stats["router"].counts.tolist() == [2, 1, 1]
    assert stats["router"].first_counts.tolist() == [2, 0, 0]
    expected = 0.8 * math.log(1 / 0.8) + 0.2 * math.log(10) + math.log(3)
    assert stats["router"].sums["entropy"].item() == pytest.approx(expected)


# No sum of the drawn scores comes near these, but for 1, which takes every expert.
@repeatable(250)
@given(case=routed_tokens(), p=st.sampled_from((0.013, 0.37, 0.41, 0.61, 0.77, 0.93, 1.0)), data=st.data())
def test_equals_the_oracle(case, p, data):
    logits, mask = case
    cap = data.draw(st.none() | st.integers(1, logits.shape[1]))
    ours, theirs = leaves(logits)
    expected, entropy = [], theirs.sum() * 0
    for t, row in enumerate(theirs):
        real = mask is None or bool(mask[t])
        expected.append(oracle.top_p(list(row), p, cap or logits.shape[1]) if real else ([], []))
        entropy = entropy + (oracle.entropy(list(row)) if real else 0)
    found = TopP(p, cap)(ours, torch.softmax(ours, -1), call_of(mask))
    assert_same(found, expected, [(ours, theirs)], [(found.sums["entropy"], entropy)])


@pytest.mark.parametrize("p", [0.0, -0.1, 1.01, math.nan])
def test_a_p_that_is_no_share_is_refused(p):
    with pytest.raises(UserError, match=r"allowed: above 0, up to 1"):
        TopP(p)


def test_a_cap_outside_the_experts_is_refused():
    with pytest.raises(UserError, match="at_most 0; allowed: 1 or more"):
        TopP(0.4, at_most=0)
    with pytest.raises(UserError, match="at_most 5 with num_experts 4; allowed: 1 to 4"):
        build_router("top_p", 8, 4, 5)
    with pytest.raises(UserError, match="at_most 5 with num_experts 4"):
        TopP(0.4, at_most=5)(torch.zeros(1, 4), torch.full((1, 4), 0.25), RoutingCall())
