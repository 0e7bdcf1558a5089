"""BASE: the balanced assignment against every other one, worked by hand and by trying all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router
from gatewright.parts.rules.base import Base, balanced_assignment
from tests.oracle import base as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import leaves

TRAINING = RoutingCall(training=True)
EXAMPLE = [[math.log(odds), 0.0] for odds in (6, 4, 3, 2)]


def logits_of(rows: list[list[float]] = EXAMPLE) -> Tensor:
    """Return fp64 logits."""
    return torch.tensor(rows, dtype=torch.float64)


def routed(logits: Tensor, call: RoutingCall = TRAINING):
    """Return the assignment of these logits."""
    return Base()(logits, torch.sigmoid(logits), call)


def taken(logits: Tensor, experts: Tensor) -> float:
    """Return the sum of the logits of the chosen."""
    return logits.gather(1, experts.view(-1, 1)).sum().item()


def test_the_best_equal_loads_by_hand():
    # {t0, t1} -> 0 is worth ln 6 + ln 4 = ln 24; the next best, {t0, t2} -> 0, ln 6 + ln 3 = ln 18.
    found = routed(logits_of())
    assert found.experts.flatten().tolist() == [0, 0, 1, 1]
    assert taken(logits_of(), found.experts) == pytest.approx(math.log(24))
    assert found.weights.flatten().tolist() == pytest.approx([6 / 7, 4 / 5, 1 / 2, 1 / 2])


def test_evaluation_takes_the_best_expert_of_each():
    found = routed(logits_of(), RoutingCall())
    assert found.experts.flatten().tolist() == [0, 0, 0, 0]
    assert found.weights.flatten().tolist() == pytest.approx([6 / 7, 4 / 5, 3 / 4, 2 / 3])


def test_others_move_aside_where_that_costs_least():
    # Greedy in order: t0 -> 0 (5), t1 -> 1 (4), t2 must take 2 (0): 9. Best: t0 -> 1 (4.9), t1 -> 2 (3.5),
    # t2 -> 0 (3): 11.4, all three moved along one path.
    logits = logits_of([[5.0, 4.9, 0.0], [0.0, 4.0, 3.5], [3.0, 0.5, 0.0]])
    assert balanced_assignment(logits).tolist() == [1, 2, 0]


def test_a_remainder_goes_where_it_gains_most():
    # T = 3, E = 2: loads 1 and 2, whichever way is better; all prefer expert 1, so it has two.
    logits = logits_of([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    assert balanced_assignment(logits).tolist() == [1, 1, 0]
    assert balanced_assignment(-logits).tolist() == [0, 0, 1]
    # Fewer tokens than experts: each has an expert to itself.
    assert balanced_assignment(logits_of([[3.0, 1.0, 0.0], [4.0, 0.0, 1.0]])).tolist() == [1, 0]


def test_padding_takes_no_place_and_groups_are_balanced_by_themselves():
    mask = torch.tensor([False, True, True, True, True])
    logits = torch.cat([logits_of([[9.0, 9.0]]), logits_of()])
    found = routed(logits, RoutingCall(mask=mask, training=True))
    assert found.experts.flatten().tolist() == [-1, 0, 0, 1, 1]
    found = routed(logits_of(), RoutingCall(training=True, group_size=2))
    assert found.experts.flatten().tolist() == [0, 1, 0, 1]
    nobody = routed(logits, RoutingCall(mask=torch.zeros(5, dtype=torch.bool), training=True))
    assert nobody.experts.flatten().tolist() == [-1] * 5


def test_a_broken_logit_counts_as_the_smallest():
    logits = logits_of([[math.nan, 0.0], [1.0, 0.0], [math.inf, -1.0], [2.0, 0.0]])
    assert balanced_assignment(logits).tolist() == [1, 0, 1, 0]
    assert sorted(balanced_assignment(torch.full((4, 2), math.nan)).tolist()) == [0, 0, 1, 1]


def test_the_gradient_reaches_the_router_through_the_sigmoid_alone():
    logits = logits_of().requires_grad_()
    routed(logits).weights.sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([6 / 49, 0, 4 / 25, 0, 0, 1 / 4, 0, 1 / 4])


@repeatable(200)
@given(st.data())
def test_no_equal_loads_are_worth_more(data: st.DataObject):
    num_experts = data.draw(st.integers(1, 4))
    num_tokens = data.draw(st.integers(0, 8 if num_experts < 3 else 6))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    logits = 2 * torch.randn(num_tokens, num_experts, generator=draw, dtype=torch.float64)
    kind = data.draw(st.sampled_from(("", "ties", "skewed")))
    if kind == "ties":
        logits = logits.round()
    if kind == "skewed":
        logits = logits + torch.linspace(0, 5, num_experts)
    mine, slow = leaves(logits)
    found = routed(mine)
    loads = torch.bincount(found.experts.flatten(), minlength=num_experts)
    assert loads.min() >= num_tokens // num_experts
    assert loads.max() <= -(-num_tokens // num_experts)
    best = oracle.best_value([list(row) for row in slow], num_experts)
    assert taken(logits, found.experts) == pytest.approx(best, abs=1e-9)
    weights = [oracle.sigmoid(slow[t, e]) for t, e in enumerate(found.experts.flatten().tolist())]
    torch.testing.assert_close(found.weights.flatten(), torch.stack(weights) if weights else logits[:, 0])
    if num_tokens:
        found.weights.square().sum().backward()
        torch.stack(weights).square().sum().backward()
        torch.testing.assert_close(mine.grad, slow.grad, rtol=1e-12, atol=1e-12)


def test_larger_problems_leave_no_gain_in_any_exchange():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(192, 16, generator=draw, dtype=torch.float64) + torch.randn(16, generator=draw)
    experts = balanced_assignment(logits)
    assert torch.bincount(experts, minlength=16).tolist() == [12] * 16
    # moves[i, j]: the least loss of moving one token from i to j; a round trip that gains would be a
    # negative cycle, which the shortest paths (Floyd-Warshall) put on the diagonal.
    own = logits.gather(1, experts.view(-1, 1)) - logits
    moves = torch.stack([own[experts == e].amin(dim=0) for e in range(16)])
    for via in range(16):
        moves = torch.minimum(moves, moves[:, via : via + 1] + moves[via])
    assert moves.diagonal().min() >= -1e-9


def test_one_expert_per_token_only():
    with pytest.raises(UserError, match="router 'base' with num_selected 2; allowed: 1"):
        build_router("base", 3, 4, 2)
