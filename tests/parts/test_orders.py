"""Who gets an expert's places: each order, groups, padding and withdrawn choices, worked by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gatewright.parts import Assignment, Capacity, MoELayer, RouterStats, make_plan
from gatewright.parts.dispatch import queue_positions
from tests.parts.harness import seen_layer

# Three tokens, three experts, K = 2, one place each. Token 0 wants 0, then 1; token 1 wants 1, then 0;
# token 2 wants 0, then 2. Their best scores are 0.5, 0.6 and 0.8.
SCORES = torch.tensor([[0.50, 0.30, 0.20], [0.25, 0.60, 0.15], [0.80, 0.05, 0.15]], dtype=torch.float64)
ONE_PLACE = 0.5  # C = ceil(0.5 * 2 * 3 / 3) = 1
SURVIVORS = {
    # 0 takes 0 and 1, so nothing is left for token 1; token 2's second choice, expert 2, is free.
    "position": [[0, 1], [-1, -1], [-1, 2]],
    # First choices: 0 to token 0, 1 to token 1, none to token 2. Then the second ones: only expert 2 is free.
    "rank": [[0, -1], [1, -1], [-1, 2]],
    # In the order 2, 1, 0. First choices: 0 to token 2, 1 to token 1, none to token 0. Then 2 to token 2.
    "batch_priority": [[-1, -1], [1, -1], [0, 2]],
}
DROPPED = {"position": [2, 1], "rank": [1, 2], "batch_priority": [1, 2]}
UNROUTED = {"position": 1, "rank": 0, "batch_priority": 1}

each_order = pytest.mark.parametrize("order", ["position", "rank", "batch_priority"])
each_backend = pytest.mark.parametrize("backend", ["reference", "grouped", "padded"])


def record_of(layer: MoELayer, x: Tensor, **options: object) -> RouterStats:
    """Return the layer's only record, with what was decided."""
    return layer(x, capture=True, **options)[1]["router"]


@each_order
@each_backend
def test_the_orders_by_hand(order: str, backend: str):
    capacity = Capacity(ONE_PLACE, order=order)  # type: ignore[arg-type]
    record = record_of(seen_layer(3, 2, weights="raw", capacity=capacity, backend=backend), SCORES.log())
    assert record.experts is not None
    assert record.experts.tolist() == SURVIVORS[order]
    assert record.dropped_by_rank.tolist() == DROPPED[order]
    assert record.unrouted.item() == UNROUTED[order]
    assert record.counts.tolist() == [3, 2, 1], "before capacity, whatever the order"
    assert record.kept.tolist() == [1, 1, 1]
    assert record.first_counts.tolist() == [2, 1, 0]


def test_what_the_orders_give_by_hand():
    # y = p x_e per kept choice, expert e passing its x on e + 1 times; the surest of token 2 is 0.8 * 1 * x.
    layer = MoELayer(
        3, 3, 2, 3, activation="relu", weights="raw", capacity=Capacity(0.5, order="rank")
    ).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
        layer.experts.w_in.copy_(torch.eye(3).expand(3, 3, 3))
        layer.experts.w_down.copy_(torch.stack([(e + 1) * torch.eye(3) for e in range(3)]))
    x = (SCORES * 20).log()  # above 0, and softmax gives the scores again
    y, _ = layer(x)
    gates = [0.50 * 1, 0.60 * 2, 0.15 * 3]
    assert y.tolist() == [pytest.approx((gate * row).tolist()) for gate, row in zip(gates, x, strict=True)]


def test_position_and_rank_agree_for_one_choice_each():
    ids = torch.tensor([[0], [1], [0], [0]])
    assignment = Assignment(ids, torch.tensor([[0.1], [0.2], [0.3], [0.4]]), 2)
    for order, slots in (
        ("position", [[0], [2], [1], [-1]]),
        ("rank", [[0], [2], [1], [-1]]),
        ("batch_priority", [[-1], [2], [0], [1]]),  # rows stay in position order: 2 before 3
    ):
        assert make_plan(assignment, 2, order=order).slots.tolist() == slots


def test_priority_is_the_highest_weight_of_a_choice_that_is_made():
    # Token 0's place of weight 0.9 is empty; of equal weights the earlier token comes first; and weights may
    # be negative (raw logits), where an empty place's 0 must not lead.
    ids = torch.tensor([[0, -1], [0, 1], [0, 1]])
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.3], [0.5, 0.4]])
    assert queue_positions(Assignment(ids, weights, 2), None, "batch_priority")[:, 0].tolist() == [2, 0, 1]
    below = Assignment(ids[:, :1], torch.tensor([[-3.0], [-1.0], [-2.0]]), 2)
    assert queue_positions(below, None, "batch_priority")[:, 0].tolist() == [2, 0, 1]


@each_backend
def test_groups_count_on_their_own(backend: str):
    # All six want expert 0 of two. Groups of 4: C = ceil(1 * 4 / 2) = 2, and of the last two ceil(2 / 2) = 1.
    x = torch.tensor([[1.0, 0.0]] * 6, dtype=torch.float64)
    options = {"weights": "raw", "capacity_factor": 1.0, "backend": backend}
    grouped = record_of(seen_layer(2, 1, group_size=4, **options), x)
    assert grouped.experts is not None
    assert grouped.experts.flatten().tolist() == [0, 0, -1, -1, 0, -1]
    assert grouped.dropped_by_rank.tolist() == [3]
    assert grouped.group_tokens.tolist() == [4, 2]
    assert grouped.group_counts.tolist() == [[4, 0], [2, 0]]
    assert grouped.group_first_counts.tolist() == [[4, 0], [2, 0]]
    # One group of six: C = 3, the first three; a group size above T is one group too.
    for size in (None, 6, 7):
        one = record_of(seen_layer(2, 1, group_size=size, **options), x)
        assert one.experts is not None
        assert one.experts.flatten().tolist() == [0, 0, 0, -1, -1, -1]


@each_backend
def test_padding_lowers_the_places_of_its_own_group(backend: str):
    # Groups of 4: the first holds 2 real tokens, C = ceil(2 / 2) = 1, the second 4, C = 2.
    x = torch.tensor([[1.0, 0.0]] * 8, dtype=torch.float64)
    mask = torch.tensor([False, True, False, True, True, True, True, True])
    layer = seen_layer(2, 1, group_size=4, weights="raw", capacity_factor=1.0, backend=backend)
    record = record_of(layer, x, mask=mask)
    assert record.experts is not None
    assert record.experts.flatten().tolist() == [-1, 0, -1, -1, 0, 0, -1, -1]
    assert record.group_tokens.tolist() == [2, 4]
    assert record.dropped_by_rank.tolist() == [3]
    assert record.unrouted.item() == 3, "padding is not left without an expert"


def test_a_group_of_padding_alone_and_no_tokens_at_all():
    layer = seen_layer(2, 1, group_size=2, weights="raw", capacity_factor=1.0)
    x = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    record = record_of(layer, x, mask=torch.tensor([False, False, True, True]))
    assert record.experts is not None
    assert record.experts.flatten().tolist() == [-1, -1, 0, -1]
    for order in ("position", "rank", "batch_priority"):
        empty = seen_layer(2, 2, group_size=2, capacity=Capacity(1.0, order=order, reroute=True))
        y, stats = empty(x[:0])
        assert y.shape == (0, 2)
        assert stats["router"].group_counts.tolist() == [[0, 0]]


@each_order
def test_a_withdrawn_choice_takes_its_place_but_is_not_computed(order: str):
    # Expert 0 has one place. Token 0 takes it and withdraws; token 1 finds none (GShard's literal counter).
    ids, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    withdrawn = torch.tensor([[True, False], [False, False]])
    assignment = Assignment(ids, weights, 2, withdrawn=withdrawn)
    for static in (False, True):
        plan = make_plan(assignment, 1, order=order, static=static)  # type: ignore[arg-type]
        assert plan.slots.tolist() == [[-1, 0], [-1, -1]]
        assert plan.counts.tolist() == [0, 1]
        roomy = make_plan(assignment, 2, order=order, static=static)  # type: ignore[arg-type]
        assert (roomy.slots >= 0).tolist() == [[False, True], [True, True]]
        dropless = make_plan(assignment, order=order, static=static)  # type: ignore[arg-type]
        assert dropless.slots.tolist() == [[-1, 1], [0, 2]]


def test_training_drops_and_evaluation_does_not():
    layer = seen_layer(2, 1, weights="raw", capacity=Capacity(0.5, eval_factor=math.inf))
    x = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    assert record_of(layer, x).dropped_by_rank.tolist() == [3]  # C = ceil(0.5 * 4 / 2) = 1
    assert record_of(layer.eval(), x).dropped_by_rank.tolist() == [0]
    wider = seen_layer(2, 1, weights="raw", capacity=Capacity(0.5, eval_factor=1.5)).eval()
    assert record_of(wider, x).dropped_by_rank.tolist() == [1]  # C = ceil(1.5 * 4 / 2) = 3


def test_a_multiple_and_a_minimum_reach_the_plan():
    x = torch.tensor([[1.0, 0.0]] * 9, dtype=torch.float64)
    for capacity, kept in (
        (Capacity(0.9), 5),  # 0.9 * 9 / 2 = 4.05 -> 5
        (Capacity(0.9, multiple=4), 8),  # 5 -> 8: more than f says
        (Capacity(0.9, minimum=7), 7),
        (Capacity(0.1, minimum=20), 9),
    ):
        assert record_of(seen_layer(2, 1, weights="raw", capacity=capacity), x).kept.tolist() == [kept, 0]


@pytest.mark.timeout(300)
def test_compiled_whole_a_capacity_decides_the_same():
    # In a program of its own: the shape checks of the test run cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-m", "tests.parts.compiled_capacity"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3
    assert not any(found.values()), {name: problem for name, problem in found.items() if problem}
