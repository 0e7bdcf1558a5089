"""Sinkhorn: plans worked by hand, what training and evaluation choose, the slow plan, what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router, count_assignments
from gatewright.parts.rules.sinkhorn import Sinkhorn, column_scales
from tests.oracle import sinkhorn as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, leaves

TRAINING = RoutingCall(training=True)
# Odds of expert 0 against expert 1, token by token.
EXAMPLE = [[math.log(odds), 0.0] for odds in (6, 4, 3, 2)]


def logits_of(rows: list[list[float]] = EXAMPLE) -> Tensor:
    """Return fp64 logits."""
    return torch.tensor(rows, dtype=torch.float64)


def plan_of(logits: Tensor, rounds: int = 100, **call: object) -> tuple[Tensor, int]:
    """Return n P [T, E], whose rows sum to 1, from the column factors, and the rounds."""
    scales, gone = column_scales(logits, RoutingCall(training=True, **call), 1e-4, rounds)  # type: ignore[arg-type]
    return torch.softmax(logits + scales.log(), dim=-1), gone


def test_the_plan_of_four_tokens_by_hand():
    # 6 * 2 = 4 * 3, so that lambda = 1 / sqrt(12) balances: p = 6 lambda / (1 + 6 lambda) = .634, and
    # .536, .464, .366 for 4, 3, 2: their sum is 2, half of the tokens.
    plan, gone = plan_of(logits_of())
    expected = [odds / math.sqrt(12) / (1 + odds / math.sqrt(12)) for odds in (6, 4, 3, 2)]
    assert expected == pytest.approx([0.634, 0.536, 0.464, 0.366], abs=5e-4)
    assert plan[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert plan[:, 0].sum().item() == pytest.approx(2, abs=1e-4)
    assert gone == 4


def test_the_plan_of_two_tokens_by_hand():
    # C = [[4, 1], [1, 1]]: p^2 / (1 - p)^2 = 4 / 1 for the symmetric plan [[p, 1-p], [1-p, p]]: p = 2/3.
    plan, _ = plan_of(logits_of([[math.log(4), 0], [0, 0]]))
    torch.testing.assert_close(plan, logits_of([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]), rtol=0, atol=1e-4)


def test_training_chooses_by_the_plan_and_weighs_by_the_raw_score():
    logits = logits_of()
    found = Sinkhorn(2, 1)(logits, torch.sigmoid(logits), TRAINING)
    assert found.experts.flatten().tolist() == [0, 0, 1, 1]
    # sigmoid(ln 6) = 6/7, sigmoid(ln 4) = 4/5, sigmoid(0) = 1/2.
    assert found.weights.flatten().tolist() == pytest.approx([6 / 7, 4 / 5, 1 / 2, 1 / 2])


def test_evaluation_chooses_by_the_raw_score():
    logits = logits_of()
    found = Sinkhorn(2, 1)(logits, torch.sigmoid(logits), RoutingCall())
    assert found.experts.flatten().tolist() == [0, 0, 0, 0]
    assert found.weights.flatten().tolist() == pytest.approx([6 / 7, 4 / 5, 3 / 4, 2 / 3])


def test_a_tie_of_raw_scores_goes_where_the_plan_has_room():
    # t1 is undecided; the plan gives it 2/3 of expert 1.
    logits = logits_of([[math.log(4), 0], [0, 0]])
    assert Sinkhorn(2, 1)(logits, torch.sigmoid(logits), TRAINING).experts.tolist() == [[0], [1]]


def test_even_columns_are_not_even_loads():
    # Odds (9, 2, 2, 2) : 1: p of t0 is .760, of the others .413 (sum 2), so that expert 0 has one token.
    logits = logits_of([[math.log(odds), 0.0] for odds in (9, 2, 2, 2)])
    plan, _ = plan_of(logits)
    assert plan[:, 0].tolist() == pytest.approx([0.760, 0.413, 0.413, 0.413], abs=1e-3)
    assert count_assignments(Sinkhorn(2, 1)(logits, torch.sigmoid(logits), TRAINING)).tolist() == [1, 3]


def test_groups_are_balanced_by_themselves():
    logits = logits_of()
    found = Sinkhorn(2, 1)(logits, torch.sigmoid(logits), RoutingCall(training=True, group_size=2))
    assert found.experts.flatten().tolist() == [0, 1, 0, 1]


def test_padding_has_no_row_in_the_plan():
    logits = torch.cat([logits_of([[math.nan, 5.0]]), logits_of()])
    mask = torch.tensor([False, True, True, True, True])
    found = Sinkhorn(2, 1)(logits, torch.sigmoid(logits), RoutingCall(mask=mask, training=True))
    assert found.experts.flatten().tolist() == [-1, 0, 0, 1, 1]


def test_for_two_experts_the_weights_are_softmax_over_all():
    router = build_router("sinkhorn", 3, 3, 2).double()
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routed = router.route(x, TRAINING)
    expected = torch.softmax(routed.logits, dim=-1).gather(1, routed.assignment.experts)
    assert torch.equal(routed.assignment.weights, expected)
    single = build_router("sinkhorn", 3, 3, 1).double().route(x, TRAINING)
    expected = torch.sigmoid(single.logits).gather(1, single.assignment.experts)
    assert torch.equal(single.assignment.weights, expected)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_overflow_nothing(size):
    # exp(100) is infinite in fp32. Token t has expert t % 4 high above the rest: balanced as it stands.
    logits = torch.eye(4).repeat(4, 1) * size
    found = Sinkhorn(4, 1)(logits, torch.sigmoid(logits), TRAINING)
    assert found.experts.flatten().tolist() == [0, 1, 2, 3] * 4


def test_one_token_with_a_broken_logit_harms_no_other():
    logits = torch.cat([logits_of([[math.inf, 0.0]]), logits_of()])
    found = Sinkhorn(2, 1)(logits, torch.sigmoid(logits), TRAINING)
    assert found.experts.flatten().tolist() == [0, 0, 0, 1, 1]


def test_rounds_end_when_converged_and_at_the_cap():
    draw = torch.Generator().manual_seed(0)
    even = torch.randn(512, 8, generator=draw)
    assert plan_of(even)[1] <= 6
    skewed = 4 * even + 2 * torch.randn(8, generator=draw)
    plan, gone = plan_of(skewed, 20)
    assert gone <= 20
    # Rows of the code's plan sum to 1 only once it has converged; here columns show it.
    assert plan.sum(dim=0).tolist() == pytest.approx([64] * 8, rel=1e-2)
    assert plan_of(skewed, 2)[1] == 2


def test_the_plan_carries_no_gradient():
    logits = logits_of().requires_grad_()
    scores = torch.sigmoid(logits)
    Sinkhorn(2, 1)(logits, scores, TRAINING).weights.sum().backward()
    # d sigmoid = s (1 - s) at the chosen, nothing elsewhere.
    assert logits.grad.flatten().tolist() == pytest.approx([6 / 49, 0, 4 / 25, 0, 0, 1 / 4, 0, 1 / 4])


@repeatable(200)
@given(st.data())
def test_it_is_the_slow_rule_in_choice_weight_and_gradient(data: st.DataObject):
    num_tokens, num_experts = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    num_selected = data.draw(st.integers(1, num_experts))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    logits = 2 * torch.randn(num_tokens, num_experts, generator=draw, dtype=torch.float64)
    mask = torch.rand(num_tokens, generator=draw) < 0.7 if data.draw(st.booleans()) else None
    group_size = data.draw(st.none() | st.integers(1, 6))
    training = data.draw(st.booleans())
    mine, slow = leaves(logits)
    call = RoutingCall(mask=mask, training=training, group_size=group_size)
    found = Sinkhorn(num_experts, num_selected)(mine, torch.sigmoid(mine), call)
    real = [True] * num_tokens if mask is None else mask.tolist()
    rows = [list(row) for row in slow]
    scores = [[1 / (1 + (-value).exp()) for value in row] for row in rows]
    expected = oracle.route(rows, scores, real, num_selected, group_size, training, 20)
    assert_same(found, expected, [(mine, slow)])


@pytest.mark.parametrize("options", [{"max_rounds": 0}, {"tolerance": -1.0}, {"tolerance": math.nan}])
def test_what_cannot_balance_is_refused(options):
    with pytest.raises(UserError, match="allowed: 1 round or more, a tolerance of 0 or more"):
        build_router("sinkhorn", 3, 4, 1, **options)
