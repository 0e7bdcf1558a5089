"""Strictly balanced gating (2017, appendix F): numbers worked by hand, what teaches the thresholds, the slow
rule.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router
from gatewright.parts.rules.strictly_balanced import StrictlyBalanced
from tests.oracle import strictly_balanced as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, leaves

SCORES = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]
TRAINING = RoutingCall(training=True)


def rule_of(num_experts: int, num_selected: int, *thresholds: float) -> StrictlyBalanced:
    """Return the rule in fp64 with these thresholds."""
    rule = StrictlyBalanced(num_experts, num_selected).double()
    if thresholds:
        with torch.no_grad():
            rule.thresholds.copy_(torch.tensor(thresholds))
    return rule


def scores_of(rows: list[list[float]] = SCORES) -> Tensor:
    """Return fp64 scores with gradient."""
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def test_in_training_each_expert_takes_m_tokens_and_gates_are_renormalised():
    # E = 3, K = 2, n = 3: m = 2. Columns take {t0, t1}, {t0, t2}, {t1, t2}.
    scores = scores_of([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.4, 0.5]])
    chosen = rule_of(3, 2)(scores, scores, TRAINING)
    assert chosen.experts.tolist() == [[0, 1], [0, 2], [2, 1]]
    # Equation 16: .6 / .9 and .3 / .9; .5 / .8 and .3 / .8; .5 / .9 and .4 / .9.
    expected = [2 / 3, 1 / 3, 5 / 8, 3 / 8, 5 / 9, 4 / 9]
    assert chosen.weights.flatten().tolist() == pytest.approx(expected)


def test_a_token_that_no_expert_takes_has_no_weights_and_a_finite_gradient():
    # E = 2, K = 1, n = 4: m = 2. Expert 0 takes t0, t2 and expert 1 takes t0 and t3: t1 stays alone.
    scores = scores_of([[0.9, 0.8], [0.1, 0.1], [0.7, 0.3], [0.2, 0.9]])
    chosen = rule_of(2, 1)(scores, scores, TRAINING)
    assert chosen.experts.tolist() == [[0, 1], [-1, -1], [0, -1], [1, -1]]
    assert chosen.weights.tolist()[1] == [0, 0]
    chosen.weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_in_evaluation_the_thresholds_decide():
    # X > T with T = (.65, .3): t0 -> 0; t1 -> 1; t2 -> 0 (.3 is not above .3); t3 -> 1.
    scores = scores_of()
    chosen = rule_of(2, 1, 0.65, 0.3)(scores, scores, RoutingCall())
    assert chosen.experts.tolist() == [[0], [1], [0], [1]]
    assert chosen.weights.flatten().tolist() == [1.0] * 4
    # T = (.1, .1): t1, t2 and t3 have both experts; t0 has expert 0, .1 not being above .1.
    chosen = rule_of(2, 1, 0.1, 0.1)(scores, scores, RoutingCall())
    assert (chosen.experts >= 0).sum(dim=1).tolist() == [1, 2, 2, 2]
    # 0.2 / (0.2 + 0.8) for the second of t3.
    assert chosen.weights[3].tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("training", [True, False])
def test_equation_20_and_its_gradient_by_hand(training):
    # m = 1 * 4 / 2 = 2. Batch masks: expert 0 {t0, t2}, expert 1 {t1, t3}. T = (.5, .5): thresholds take
    # {t0, t1, t2} and {t3}. Differences: +1 at (t1, 0), -1 at (t1, 1): (.6 - .5) - (.4 - .5) = .2.
    scores, rule = scores_of(), rule_of(2, 1, 0.5, 0.5)
    total = rule(scores, scores, RoutingCall(training=training)).sums["threshold"]
    assert total.item() == pytest.approx(0.2)
    total.backward()
    # dL/dT_i = -(tokens above T_i - m): -(3 - 2), -(1 - 2).
    assert rule.thresholds.grad.tolist() == [-1.0, 1.0]
    assert scores.grad.tolist() == [[0, 0], [1, -1], [0, 0], [0, 0]]
    # Masks that agree: T between the second and the third of each column.
    assert rule_of(2, 1, 0.65, 0.35)(scores, scores, TRAINING).sums["threshold"].item() == 0


def test_descending_equation_20_makes_the_masks_agree():
    draw = torch.Generator().manual_seed(0)
    scores = torch.softmax(torch.randn(64, 4, generator=draw, dtype=torch.float64), dim=-1)
    rule = rule_of(4, 2)
    by_batch = rule(scores, scores, TRAINING).experts
    for _ in range(400):
        rule.zero_grad()
        rule(scores, scores, TRAINING).sums["threshold"].backward()
        with torch.no_grad():
            rule.thresholds -= 1e-3 * rule.thresholds.grad.sign()
    by_threshold = rule(scores, scores, RoutingCall()).experts
    missed = abs(int((by_threshold >= 0).sum()) - int((by_batch >= 0).sum()))
    assert missed <= 4  # of 128 assignments


def test_padding_is_in_neither_mask_nor_sum():
    scores = scores_of([[0.99, 0.99], *SCORES])
    mask = torch.tensor([False, True, True, True, True])
    for training in (True, False):
        found = rule_of(2, 1, 0.5, 0.5)(scores, scores, RoutingCall(mask=mask, training=training))
        assert found.experts[0].tolist() == [-1] * found.num_selected
        assert found.sums["threshold"].item() == pytest.approx(0.2)


def test_the_thresholds_are_parameters_of_the_router():
    router = build_router("batchwise", 3, 4, 2)
    assert [name for name, _ in router.named_parameters()] == ["weight", "rule.thresholds"]
    assert router.rule.thresholds.tolist() == pytest.approx([0.2] * 4)
    # The only expert is above its first threshold of 1/2.
    alone = StrictlyBalanced(1, 1)(torch.zeros(2, 1), torch.ones(2, 1), RoutingCall())
    assert alone.experts.tolist() == [[0], [0]]


@repeatable(200)
@given(st.data())
def test_it_is_the_slow_rule_in_choice_weight_sum_and_gradient(data: st.DataObject):
    num_tokens, num_experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    num_selected = data.draw(st.integers(1, num_experts))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = torch.rand(num_tokens, num_experts, generator=draw, dtype=torch.float64)
    if data.draw(st.booleans()):
        scores = ((4 * scores).round() + 1) / 5
    mask = torch.rand(num_tokens, generator=draw) < 0.7 if data.draw(st.booleans()) else None
    group_size = data.draw(st.none() | st.integers(1, 6))
    training = data.draw(st.booleans())
    mine, slow = leaves(scores)
    rule = rule_of(num_experts, num_selected, *torch.rand(num_experts, generator=draw).tolist())
    thresholds = rule.thresholds.detach().clone().requires_grad_()
    call = RoutingCall(mask=mask, training=training, group_size=group_size)
    found = rule(mine, mine, call)
    real = [True] * num_tokens if mask is None else mask.tolist()
    expected, total = oracle.route(
        [list(row) for row in slow], real, list(thresholds), num_selected, group_size, training
    )
    pairs = [(mine, slow), (rule.thresholds, thresholds)]
    assert_same(found, expected, pairs, [(found.sums["threshold"], total)])


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4; allowed: 1 to 4"):
        build_router("batchwise", 3, 4, 5)
