"""No-token-left-behind by hand: who moves where, what a moved choice weighs, and what the statistics say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewright.parts import Assignment, Capacity, MoELayer, balance_loss
from gatewright.parts.reroute import reroute
from gatewright.parts.router import Routed
from tests.parts.harness import seen_layer

each_backend = pytest.mark.parametrize("backend", ["reference", "grouped", "padded"])


def layer_and_record(scores: Tensor, num_selected: int, capacity: Capacity, **options: object):
    """Return (layer, record) of a layer whose softmax scores are `scores`."""
    layer = seen_layer(scores.shape[1], num_selected, capacity=capacity, **options)
    return layer, layer(scores.log(), capture=True)[1]["router"]


# Three tokens of three experts, one place each; all want expert 0.
CROWD = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64)


@each_backend
def test_switch_appendix_b_by_hand(backend: str):
    # C = ceil(1 * 3 / 3) = 1. Token 0 keeps 0. Round 1: tokens 1 and 2 go to 1, token 1 comes first.
    # Round 2: token 2 goes to 2.
    _, record = layer_and_record(CROWD, 1, Capacity(1.0, reroute=True), weights="raw", backend=backend)
    assert record.experts.flatten().tolist() == [0, 1, 2]
    assert record.combine_weights.flatten().tolist() == pytest.approx([0.6, 0.2, 0.1])
    assert record.dropped_by_rank.tolist() == [0]
    assert record.unrouted.item() == 0
    assert record.kept.tolist() == [1, 1, 1]
    # What the router chose is what balance losses see.
    assert record.counts.tolist() == record.first_counts.tolist() == [3, 0, 0]
    assert record.group_counts.tolist() == [[3, 0, 0]]


def test_the_surest_goes_first_in_every_round():
    # Batch priority: token 1 (0.7) keeps 0. Then token 2 (0.6) before token 0 (0.5): 1, and 2 for the last.
    capacity = Capacity(1.0, order="batch_priority", reroute=True)
    _, record = layer_and_record(CROWD.flip(0), 1, capacity, weights="raw")
    assert record.experts.flatten().tolist() == [2, 0, 1]


def test_a_place_stays_although_the_weight_that_won_it_has_moved():
    # C = ceil(0.5 * 2 * 3 / 5) = 1, in the order 1, 0, 2 (0.7, 0.6, 0.5). First choices: 0 to token 1, 3 to
    # token 2; second ones: 2 to token 1, 1 to token 0. Then token 0's first goes to 4, and token 2's second
    # finds 4, 0 and 2 full. Token 0's highest weight is 0.3 now, below token 2's 0.5; it keeps expert 1.
    scores = torch.tensor(
        [[0.60, 0.30, 0.02, 0.01, 0.07], [0.70, 0.03, 0.20, 0.01, 0.06], [0.02, 0.40, 0.01, 0.50, 0.07]],
        dtype=torch.float64,
    )
    capacity = Capacity(0.5, order="batch_priority", reroute=True)
    _, record = layer_and_record(scores, 2, capacity, weights="raw")
    assert record.experts.tolist() == [[4, 1], [0, 2], [3, -1]]
    assert record.combine_weights[0].tolist() == pytest.approx([0.07, 0.30])
    assert record.dropped_by_rank.tolist() == [0, 1]


def test_the_balance_loss_sees_what_the_router_chose():
    losses = []
    for again in (False, True):
        layer = seen_layer(3, 1, weights="raw", capacity=Capacity(1.0, reroute=again))
        losses.append(balance_loss(layer(CROWD.log())[1]).item())
    # 3 * (3/3) * mean score of expert 0 = 3 * 0.6: spread by force, the router is no better balanced.
    assert losses == pytest.approx([1.8, 1.8])


def test_who_finds_no_room_is_dropped_and_counted():
    # C = ceil(0.5 * 3 / 2) = 1, three tokens, two places.
    scores = torch.tensor([[0.9, 0.1]] * 3, dtype=torch.float64)
    _, record = layer_and_record(scores, 1, Capacity(0.5, reroute=True), weights="raw")
    assert record.experts.flatten().tolist() == [0, 1, -1]
    assert record.dropped_by_rank.tolist() == [1]
    assert record.unrouted.item() == 1


def test_who_has_a_place_keeps_it():
    # C = 1. Tokens 0 and 1 want 0, token 2 wants 1. Token 1 goes on to 1, which token 2 holds since the first
    # round although it comes later, and from there to 2.
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]], dtype=torch.float64)
    _, record = layer_and_record(scores, 1, Capacity(1.0, reroute=True), weights="raw")
    assert record.experts.flatten().tolist() == [0, 2, 1]


def test_who_moved_in_an_earlier_round_has_a_place_too():
    # C = 1: token 0 holds 0 and token 2 holds 2. Round 1: token 1 takes 1, token 3 finds 2 full. Round 2:
    # token 3 finds 1 full, since token 1 came before. Round 3: it takes 3.
    scores = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1], [0.6, 0.3, 0.06, 0.04], [0.1, 0.1, 0.7, 0.1], [0.5, 0.2, 0.25, 0.05]],
        dtype=torch.float64,
    )
    _, record = layer_and_record(scores, 1, Capacity(1.0, reroute=True), weights="raw")
    assert record.experts.flatten().tolist() == [0, 1, 2, 3]


def test_two_choices_never_meet_at_one_expert():
    # E = 4, K = 2, C = ceil(0.5 * 2 * 4 / 4) = 1. Both tokens of scores .4 .3 .2 .1 want 0 and 1. In position
    # order token 0 holds both; token 1's first choice goes to 2, its second to 3: 0.4 + 0.3 was its divisor.
    # Tokens 2 and 3 find nothing any more.
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4, dtype=torch.float64)
    capacity = Capacity(0.5, reroute=True)
    _, record = layer_and_record(scores, 2, capacity, weights="renormalised")
    assert record.experts.tolist() == [[0, 1], [2, 3], [-1, -1], [-1, -1]]
    assert record.combine_weights[1].tolist() == pytest.approx([0.2 / 0.7, 0.1 / 0.7])
    assert record.combine_weights[2].tolist() == pytest.approx([0.4 / 0.7, 0.3 / 0.7]), (
        "the dropped stay as is"
    )
    assert record.dropped_by_rank.tolist() == [2, 2]
    # By rank the same: in round 1 tokens 1, 2 and 3 all want 2 with rank 0 and 3 with rank 1.
    ranked = Capacity(0.5, order="rank", reroute=True)
    _, record = layer_and_record(scores, 2, ranked, weights="renormalised")
    assert record.experts.tolist() == [[0, 1], [2, 3], [-1, -1], [-1, -1]]


def test_a_choice_does_not_join_its_own_token_s_other_one():
    # C = ceil(1 * 2 * 3 / 4) = 2. Tokens 0 and 1 fill expert 1; token 2's second choice goes to 2, although
    # expert 0, where its first is, has room and scores higher.
    scores = torch.tensor(
        [[0.05, 0.60, 0.25, 0.10], [0.05, 0.60, 0.10, 0.25], [0.50, 0.30, 0.15, 0.05]], dtype=torch.float64
    )
    _, record = layer_and_record(scores, 2, Capacity(1.0, reroute=True), weights="raw")
    assert record.experts.tolist() == [[1, 2], [1, 3], [0, 2]]


def test_within_a_round_the_order_decides():
    # C = 1, E = 4; tokens 0 and 1 hold everything but 2 and 3. Token 2 wants 0, 1 and may go to 2, 3; token 3
    # wants 0, 1 and may go to 3, 2. By position token 2 takes both; by rank each takes its own best.
    scores = torch.tensor(
        [[0.9, 0.05, 0.03, 0.02], [0.05, 0.9, 0.03, 0.02], [0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.05, 0.15]],
        dtype=torch.float64,
    )
    ids = torch.tensor([[0, -1], [1, -1], [0, 1], [0, 1]])
    routed = Routed(scores, scores, scores, Assignment(ids, scores.gather(1, ids.clamp(min=0)), 4))
    for order, ends in (
        ("position", [[0, -1], [1, -1], [2, 3], [0, 1]]),
        ("rank", [[0, -1], [1, -1], [2, 1], [3, 1]]),
    ):
        sent, kept = reroute(routed, 1, None, order)  # type: ignore[arg-type]
        assert sent.experts.tolist() == ends
        assert kept.tolist() == [[e >= 0 and (t < 2 or e > 1) for e in row] for t, row in enumerate(ends)], (
            "who found no place stays as it was"
        )


def test_groups_and_padding_move_on_their_own():
    # Two groups of two tokens, three experts, C = 1 by a tensor; token 1 is padding and goes nowhere.
    scores = torch.tensor([[0.6, 0.3, 0.1]] * 4, dtype=torch.float64)
    capacity = Capacity(1.5, reroute=True)  # ceil(1.5 * 2 / 3) = 1, and ceil(1.5 * 1 / 3) = 1
    layer = seen_layer(3, 1, weights="raw", capacity=capacity, group_size=2)
    record = layer(scores.log(), torch.tensor([True, False, True, True]), capture=True)[1]["router"]
    assert record.experts.flatten().tolist() == [0, -1, 0, 1]
    assert record.dropped_by_rank.tolist() == [0]


def test_a_withdrawn_choice_stands_in_the_way_and_never_moves():
    # Expert 0 has one place, which the withdrawn choice of token 0 takes; token 1 goes on.
    scores = torch.tensor([[0.6, 0.4], [0.7, 0.3]], dtype=torch.float64)
    ids, withdrawn = torch.tensor([[0], [0]]), torch.tensor([[True], [False]])
    own = Assignment(ids, scores[:, :1], 2, withdrawn=withdrawn)
    sent, kept = reroute(Routed(scores, scores, scores, own), 1, None, "position")
    assert sent.experts.tolist() == [[0], [1]]
    assert kept.tolist() == [[False], [True]]


def test_a_score_of_zero_gives_the_new_score_and_finite_gradients():
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0], [0]])
    own = Assignment(ids, scores.gather(1, ids), 3)
    sent, kept = reroute(Routed(scores, scores, scores, own), 1, None, "position")
    assert sent.experts.tolist() == [[0], [2]]
    assert kept.all()
    assert sent.weights.flatten().tolist() == [1.0, 0.5]
    sent.weights.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_gradients_go_to_the_scores_of_the_experts_that_computed():
    # Raw weights: d y / d p is 1 for the expert that was gone to, 0 for the one that was full.
    scores = CROWD.clone().requires_grad_()
    ids = torch.zeros(3, 1, dtype=torch.int64)
    own = Assignment(ids, scores.gather(1, ids), 3)
    sent, _ = reroute(Routed(scores, scores, scores, own), 1, None, "position")
    assert sent.weights.flatten().tolist() == [0.6, 0.2, 0.1], "exactly the scores"
    sent.weights.sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.eye(3, dtype=torch.float64))


def test_one_expert_has_nowhere_else():
    layer = MoELayer(2, 1, 1, 3, weights="raw", capacity=Capacity(0.5, reroute=True))
    assert layer(torch.randn(4, 2))[1]["router"].dropped_by_rank.tolist() == [2]
