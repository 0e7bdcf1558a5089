"""Expert choice: numbers worked by hand, ties, rounding, groups, padding, the slow rule, the capped form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router, count_assignments
from gatewright.parts.rules.expert_choice import ExpertChoice, column_top
from tests.oracle import expert_choice as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, leaves

NAN = math.nan
SCORES = [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]


def routed(scores: Tensor, factor: float, most: int | None = None, **call: object):
    """Return the assignment of scores [T, E]."""
    rule = ExpertChoice(scores.shape[1], factor, most)
    return rule(scores.log(), scores, RoutingCall(**call))  # type: ignore[arg-type]


def test_each_expert_takes_its_best_tokens_at_their_raw_scores():
    # n = 4, E = 2, c = 1: k = 1 * 4 / 2 = 2. Expert 0 takes 0.9 (t0) and 0.7 (t2), expert 1 takes 0.8 (t3)
    # and 0.4 (t1).
    chosen = routed(torch.tensor(SCORES), 1)
    assert chosen.experts.tolist() == [[0], [1], [0], [1]]
    assert chosen.weights.flatten().tolist() == pytest.approx([0.9, 0.4, 0.7, 0.8])


def test_a_token_may_have_many_experts_or_none():
    # Expert 0: t0 (.5), t1 (.4); expert 1: t0 (.3), t2 (.25); expert 2: t3 (.9), t2 (.35): t0 has two.
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.24, 0.1], [0.1, 0.25, 0.35], [0.05, 0.05, 0.9]])
    chosen = routed(scores, 1.5)  # k = 1.5 * 4 / 3 = 2
    assert chosen.experts.tolist() == [[0, 1], [0, -1], [2, 1], [2, -1]]
    # k = ceil(0.75 * 4 / 3) = 1: t0 twice, t3 once; t1 and t2 go without.
    assert routed(scores, 0.75).experts.tolist() == [[0, 1], [-1, -1], [-1, -1], [2, -1]]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor", "places"),
    # ceil(2 * 5 / 4) = ceil(2.5); ceil(0.1 * 30 / 3) is 1, as 0.1 was written; never beyond n.
    [(8, 4, 2, 4), (5, 4, 2, 3), (30, 3, 0.1, 1), (3, 2, 2, 3), (1, 8, 1, 1)],
)
def test_the_load_is_exactly_k_rounded_up(num_tokens, num_experts, factor, places):
    draw = torch.Generator().manual_seed(0)
    chosen = routed(torch.rand(num_tokens, num_experts, generator=draw), factor)
    assert count_assignments(chosen).tolist() == [places] * num_experts


def test_of_equal_scores_the_first_token_is_taken():
    # k = 2 of 5: 0.5 is certain, of the three 0.3 the first goes with it.
    chosen = routed(torch.tensor([[0.1], [0.3], [0.5], [0.3], [0.3]]), 0.4)
    assert chosen.experts.tolist() == [[-1], [0], [0], [-1], [-1]]
    assert routed(torch.full((6, 3), 1 / 3), 1).experts[:, 0].tolist() == [0, 0, -1, -1, -1, -1]


def test_padding_is_never_taken_and_k_counts_real_tokens():
    # 4 real tokens of 6: k = 1 * 4 / 2 = 2, not 3.
    scores = torch.tensor([[0.99, 0.98], *SCORES, [NAN, NAN]])
    mask = torch.tensor([False, True, True, True, True, False])
    chosen = routed(scores, 1, mask=mask)
    assert chosen.experts.tolist() == [[-1], [0], [1], [0], [1], [-1]]
    assert not routed(scores, 1, mask=torch.zeros(6, dtype=torch.bool)).weights.any()


def test_groups_choose_by_themselves():
    # Groups {t0, t1}, {t2, t3}: k = 1; expert 0 takes t0 and t2, expert 1 takes t1 and t3.
    chosen = routed(torch.tensor(SCORES), 1, group_size=2)
    assert chosen.experts.tolist() == [[0], [1], [0], [1]]
    # Groups of 3, the last of one token: k = ceil(1.5) = 2, then ceil(0.5) = 1, so that t3 has both.
    chosen = routed(torch.tensor(SCORES), 1, group_size=3)
    assert chosen.experts.tolist() == [[0, -1], [1, -1], [0, 1], [1, 0]]


def test_a_nan_stands_last_and_harms_no_other_token():
    scores = torch.tensor([[NAN], [0.3], [0.5]])
    assert routed(scores, 0.6).experts.tolist() == [[-1], [0], [0]]
    assert routed(scores, 1.0).experts.tolist() == [[0], [0], [0]]


def test_the_gradient_of_a_weight_is_that_of_its_score():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    chosen = ExpertChoice(2, 1)(logits, torch.softmax(logits, -1), RoutingCall())
    # Expert 0 takes t1 (1/2), expert 1 takes t0 (3/4): d .75 = .75 * .25, d .5 = .25.
    chosen.weights.sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-3 / 16, 3 / 16, 1 / 4, -1 / 4])


@repeatable(200)
@given(st.data())
def test_it_is_the_slow_rule_in_choice_weight_and_gradient(data: st.DataObject):
    num_tokens, num_experts = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 5))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = torch.rand(num_tokens, num_experts, generator=draw, dtype=torch.float64)
    if data.draw(st.booleans()):
        scores = (4 * scores).round() / 4
    mask = torch.rand(num_tokens, generator=draw) < 0.7 if data.draw(st.booleans()) else None
    factor = data.draw(st.sampled_from((0.1, 0.5, 1.0, 1.25, 2.0)).filter(lambda c: c <= num_experts))
    group_size = data.draw(st.none() | st.integers(1, 8))
    mine, slow = leaves(scores)
    found = ExpertChoice(num_experts, factor)(mine, mine, RoutingCall(mask=mask, group_size=group_size))
    real = [True] * num_tokens if mask is None else mask.tolist()
    expected = oracle.route([list(row) for row in slow], real, factor, group_size)
    assert_same(found, expected, [(mine, slow)])


@repeatable(200)
@given(st.data())
def test_compiled_code_takes_the_way_of_ties_and_ends_the_same(data: st.DataObject):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = torch.rand(data.draw(st.integers(1, 9)), 3, generator=draw)
    call = RoutingCall(mask=torch.rand(len(scores), generator=draw) < 0.8, group_size=4)
    fast, _ = column_top(scores, (2, 3), call)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        careful, _ = column_top(scores, (2, 3), call)
    assert torch.equal(fast, careful)


def test_the_capped_form_spreads_what_one_token_would_take():
    # Uncapped, all three experts would take t0 (k = 1). With b = 1 they take three different tokens; of the
    # six ways, expert 1 on t0, 0 on t1 and 2 on t2 is worth most: .40 + .35 + .20 = .95 against
    # .50 + .20 + .20 = .90, .50 + .15 + .10 = .75 and less.
    scores = torch.tensor([[0.50, 0.40, 0.30], [0.35, 0.20, 0.10], [0.10, 0.15, 0.20]])
    assert routed(scores, 1).experts.tolist()[0] == [0, 1, 2]
    capped = routed(scores, 1, most=1)
    assert capped.experts.tolist() == [[1], [0], [2]]
    assert capped.weights.flatten().tolist() == pytest.approx([0.40, 0.35, 0.20])


def test_the_capped_form_keeps_to_its_limit_and_its_load():
    draw = torch.Generator().manual_seed(0)
    scores = torch.softmax(2 * torch.randn(128, 4, generator=draw, dtype=torch.float64), dim=-1)
    mask = torch.arange(128) % 32 < 24
    chosen = routed(scores, 2, most=2, mask=mask, group_size=32)
    assert count_assignments(chosen).tolist() == [4 * 24 // 2] * 4
    assert not (chosen.experts >= 0)[~mask].any()
    above = ((chosen.experts >= 0).sum(dim=1) > 2).sum()
    free = ((routed(scores, 2, mask=mask, group_size=32).experts >= 0).sum(dim=1) > 2).sum()
    assert free >= 16
    assert above <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor 0.0 with num_experts 4; allowed: above 0, up to 4"),
        ({"capacity_factor": 5}, "capacity_factor 5 with num_experts 4; allowed"),
        ({"capacity_factor": NAN}, "capacity_factor nan"),
        ({"most_per_token": 1}, "most_per_token 1 with capacity_factor 2; allowed: 2 or more, or none"),
    ],
)
def test_what_no_expert_can_have_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_router("expert_choice", 3, 4, 2, **options)
