"""What Stats tell apart: routing groups, sequences, first choices, and counts before and after rerouting."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.kernels import DispatchPlan
from gatewright.parts import Assignment, Capacity, RouterStats, make_plan
from gatewright.parts.groups import from_groups, group_ids, num_groups, to_groups, tokens_of_groups
from gatewright.parts.record import record_call
from gatewright.parts.router import Routed
from tests.parts.harness import seen_layer

LN2, LN4 = math.log(2), math.log(4)
# exp of these logits: (4, 2, 1), (4, 1, 2), (4, 2, 1), (1, 2, 4). K = 2 chooses 0 1 | 0 2 | 0 1 | 2 1.
LOGITS = torch.tensor(
    [[LN4, LN2, 0.0], [LN4, 0.0, LN2], [LN4, LN2, 0.0], [0.0, LN2, LN4]], dtype=torch.float64
)


def test_sequences_are_told_apart_where_the_layer_has_no_groups():
    record = seen_layer(3, 2)(LOGITS.view(2, 2, 3))[1]["router"]
    assert record.group_tokens.tolist() == [2, 2]
    assert record.group_counts.tolist() == [[2, 1, 1], [1, 2, 1]]
    assert record.group_first_counts.tolist() == [[2, 0, 0], [1, 0, 1]]
    # (4 + 4, 2 + 1, 1 + 2) / 7 and (4 + 1, 2 + 2, 1 + 4) / 7
    assert record.group_score_sums.tolist() == [
        pytest.approx([8 / 7, 3 / 7, 3 / 7]),
        pytest.approx([5 / 7, 4 / 7, 5 / 7]),
    ]
    assert record.tokens.item() == 4
    assert record.counts.tolist() == [3, 3, 2]
    assert record.first_counts.tolist() == [3, 0, 1]
    assert record.score_sums.tolist() == pytest.approx([13 / 7, 7 / 7, 8 / 7])


def test_sequences_with_padding():
    mask = torch.tensor([[True, False], [True, True]])
    record = seen_layer(3, 2)(LOGITS.view(2, 2, 3), mask)[1]["router"]
    assert record.group_tokens.tolist() == [1, 2]
    assert record.group_counts.tolist() == [[1, 1, 0], [1, 2, 1]]
    assert record.group_first_counts.tolist() == [[1, 0, 0], [1, 0, 1]]
    assert record.group_score_sums[0].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert record.first_counts.tolist() == [2, 0, 1]
    assert record.tokens.item() == 3


def test_routing_groups_go_before_sequences_and_the_last_may_be_smaller():
    record = seen_layer(3, 2, group_size=3)(LOGITS.view(2, 2, 3))[1]["router"]
    assert record.group_tokens.tolist() == [3, 1]
    assert record.group_counts.tolist() == [[3, 2, 1], [0, 1, 1]]
    assert record.group_first_counts.tolist() == [[3, 0, 0], [0, 0, 1]]
    assert record.group_score_sums[1].tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_one_sequence_and_a_flat_batch_are_one_group():
    for x in (LOGITS, LOGITS.view(1, 4, 3)):
        record = seen_layer(3, 2)(x)[1]["router"]
        assert record.group_tokens.tolist() == [4]
        assert record.group_counts.tolist() == [[3, 3, 2]]
        assert torch.equal(record.group_score_sums, record.score_sums.unsqueeze(0))
    assert seen_layer(3, 2)(LOGITS.view(2, 1, 2, 3))[1]["router"].group_tokens.tolist() == [2, 2]


def test_first_choices_of_a_single_choice_are_all():
    record = seen_layer(3, 1, weights="raw")(LOGITS)[1]["router"]
    assert record.first_counts.tolist() == record.counts.tolist() == [3, 0, 1]


def test_group_sums_carry_the_gradient():
    x = LOGITS.clone().requires_grad_()
    record = seen_layer(3, 2, group_size=2)(x)[1]["router"]
    gradient = torch.autograd.grad(record.group_score_sums[1, 0], x)[0]
    assert gradient[:2].tolist() == [[0, 0, 0]] * 2, "of its own group alone"
    # d p0 / d x0 = p0 (1 - p0) = 4/7 * 3/7
    assert gradient[2, 0].item() == pytest.approx(12 / 49)


def record_by_hand(assignment: Assignment, plan: DispatchPlan, **options: object) -> RouterStats:
    """Return the record of an assignment whose scores mean nothing."""
    scores = torch.full((assignment.num_tokens, assignment.num_experts), 1 / assignment.num_experts)
    routed = Routed(scores.log(), scores, scores, assignment)
    return record_call(routed, plan, options.get("mask"), None, False)  # type: ignore[arg-type]


def test_tokens_that_chose_nobody_are_unrouted():
    # Token 1 chose no expert; token 2's only choice is withdrawn; token 3 is dropped; token 4 is padding.
    ids = torch.tensor([[0, 1], [-1, -1], [1, -1], [0, -1], [-1, -1]])
    withdrawn = torch.tensor([[False] * 2, [False] * 2, [True, False], [False] * 2, [False] * 2])
    assignment = Assignment(ids, torch.ones(5, 2), 2, withdrawn=withdrawn)
    record = record_by_hand(
        assignment, make_plan(assignment, 1), mask=torch.tensor([True, True, True, True, False])
    )
    assert record.unrouted.item() == 3
    assert record.counts.tolist() == [2, 1], "withdrawn choices are not counted"
    assert record.first_counts.tolist() == [2, 0]
    assert record.dropped_by_rank.tolist() == [1, 0]
    assert record.kept.tolist() == [1, 1]


def test_the_sums_over_groups_are_the_sums():
    torch.manual_seed(0)
    layer = seen_layer(5, 2, group_size=3, capacity=Capacity(0.8, order="rank"))
    record = layer(torch.randn(10, 5, dtype=torch.float64))[1]["router"]
    assert torch.equal(record.group_counts.sum(0), record.counts)
    assert torch.equal(record.group_first_counts.sum(0), record.first_counts)
    assert record.group_tokens.sum() == record.tokens == 10
    torch.testing.assert_close(record.group_score_sums.sum(0), record.score_sums)
    assert (record.counts - record.kept).sum() == record.dropped_by_rank.sum()


def test_group_helpers_by_hand():
    assert [num_groups(n, 4) for n in (0, 1, 4, 5, 8)] == [1, 1, 1, 2, 2]
    assert num_groups(7, None) == 1
    device = torch.device("cpu")
    assert group_ids(5, 2, device).tolist() == [0, 0, 1, 1, 2]
    assert group_ids(5, None, device).tolist() == group_ids(5, 9, device).tolist() == [0] * 5
    values = torch.arange(10.0).view(5, 2)
    grouped = to_groups(values, 2)
    assert grouped.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 0]]]
    assert torch.equal(from_groups(grouped, 5), values)
    assert to_groups(values, None).shape == (1, 5, 2)
    assert to_groups(values[:0], 3).shape == (1, 0, 2)
    assert tokens_of_groups(None, 5, 2, device).tolist() == [2, 2, 1]
    assert (
        tokens_of_groups(None, 5, 9, device).tolist()
        == tokens_of_groups(None, 5, None, device).tolist()
        == [5]
    )
    mask = torch.tensor([True, False, False, False, True])
    assert tokens_of_groups(mask, 5, 2, device).tolist() == [1, 0, 1]
    assert tokens_of_groups(mask, 5, None, device).tolist() == [2]
    assert tokens_of_groups(None, 0, 2, device).tolist() == [0]
