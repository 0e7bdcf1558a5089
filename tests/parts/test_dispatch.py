"""Dispatch plans: both views agree with a count by hand, and capacity drops exactly the latest."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import Assignment, DispatchPlan, count_assignments, expert_capacity, make_plan
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable


def assign(rows: list[list[int]], num_experts: int, num_selected: int | None = None) -> Assignment:
    """Return an assignment with weights 1."""
    width = (len(rows[0]) if rows else 1) if num_selected is None else num_selected
    experts = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
    return Assignment(experts, torch.ones(len(rows), width), num_experts)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Draw (rows [T][K] of expert ids or -1, E, K); an expert may be empty, or chosen by all."""
    num_experts, num_selected = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    place = st.integers(-1, num_experts - 1) | st.just(draw(st.integers(0, num_experts - 1)))
    rows = draw(st.lists(st.lists(place, min_size=num_selected, max_size=num_selected), max_size=12))
    return rows, num_experts, num_selected


def survivors(rows: list[list[int]], num_experts: int, capacity: int | None) -> list[list[tuple[int, int]]]:
    """Return, per expert, the (token, rank) of its kept assignments in position order, counted by hand."""
    kept: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for t, experts in enumerate(rows):
        for rank, e in enumerate(experts):
            if e >= 0 and (capacity is None or len(kept[e]) < capacity):
                kept[e].append((t, rank))
    return kept


def check(plan: DispatchPlan, rows: list[list[int]], num_experts: int, capacity: int | None) -> None:
    """Hold a plan against the survivors."""
    kept = survivors(rows, num_experts, capacity)
    assert plan.counts.tolist() == [len(group) for group in kept]
    assert plan.token_ids.tolist() == [t for group in kept for t, _ in group]
    row_of = {place: row for row, place in enumerate(place for group in kept for place in group)}
    slots = [[row_of.get((t, rank), -1) for rank in range(len(experts))] for t, experts in enumerate(rows)]
    assert plan.slots.tolist() == slots
    assert plan.all_kept == all(slot >= 0 for row in slots for slot in row)
    assert (plan.token_ids.dtype, plan.counts.dtype, plan.slots.dtype) == (torch.int64,) * 3
    assert (plan.num_tokens, plan.num_experts) == (len(rows), num_experts)


@repeatable(300)
@given(drawn=assignments(), capacity=st.none() | st.integers(0, 14))
def test_a_plan_keeps_the_first_of_each_expert_in_position_order(drawn, capacity: int | None):
    rows, num_experts, num_selected = drawn
    check(make_plan(assign(rows, num_experts, num_selected), capacity), rows, num_experts, capacity)


@repeatable(200)
@given(drawn=assignments(), capacity=st.none() | st.integers(0, 14))
def test_both_views_say_the_same(drawn, capacity: int | None):
    rows, num_experts, num_selected = drawn
    assignment = assign(rows, num_experts, num_selected)
    plan = make_plan(assignment, capacity)
    num_kept = int(plan.counts.sum())
    held = plan.slots[plan.slots >= 0]
    assert sorted(held.tolist()) == list(range(num_kept)), "each kept assignment stands in exactly one row"
    assert plan.token_ids.shape == (num_kept,)
    owner = torch.repeat_interleave(torch.arange(num_experts), plan.counts)
    for t, rank in (plan.slots >= 0).nonzero().tolist():
        row = plan.slots[t, rank]
        assert plan.token_ids[row] == t
        assert owner[row] == rows[t][rank]
    made = count_assignments(assignment)
    assert made.dtype == torch.int64
    assert made.tolist() == [sum(row.count(e) for row in rows) for e in range(num_experts)]
    limit = made if capacity is None else made.clamp(max=capacity)
    assert torch.equal(plan.counts, limit), "nothing over capacity, and nothing dropped that had room"
    # Within an expert the dropped come after the kept: position = token * K + rank.
    position = torch.arange(plan.slots.numel()).view_as(plan.slots)
    for e in range(num_experts):
        mine = assignment.experts == e
        kept, lost = position[mine & (plan.slots >= 0)], position[mine & (plan.slots < 0)]
        assert not kept.numel() or not lost.numel() or kept.max() < lost.min()


def test_a_plan_by_hand():
    # In position order: t0 -> 1, 0; t1 -> 1, 2; t2 -> 1, 0. With capacity 2, expert 1 is full for t2.
    plan = make_plan(assign([[1, 0], [1, 2], [1, 0]], 4), 2)
    assert plan.token_ids.tolist() == [0, 2, 0, 1, 1]
    assert plan.counts.tolist() == [2, 2, 1, 0]
    assert plan.slots.tolist() == [[2, 0], [3, 4], [-1, 1]]
    assert not plan.all_kept


def test_counts_by_hand():
    assert count_assignments(assign([[1, 0], [1, -1], [1, 2]], 4)).tolist() == [1, 3, 1, 0]


def test_a_token_s_second_choice_comes_before_the_next_token_s_first():
    # Not rank by rank (GShard): expert 0 has one place, and token 0 takes it with its second choice.
    plan = make_plan(assign([[1, 0], [0, 1]], 2), 1)
    assert plan.slots.tolist() == [[1, 0], [-1, -1]]


def test_padding_takes_no_place():
    plan = make_plan(assign([[-1], [0], [-1], [0], [0]], 2), 2)
    assert plan.slots.tolist() == [[-1], [0], [-1], [1], [-1]]
    assert plan.token_ids.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("factor", "num_selected", "num_tokens", "num_experts", "places"),
    [
        (1.0, 1, 8, 4, 2),
        (1.0, 1, 9, 4, 3),  # 2.25, rounded up
        (1.25, 1, 16, 4, 5),
        (1.25, 2, 16, 4, 10),  # K counts: each token makes two assignments
        (2.0, 2, 3, 8, 2),  # 1.5
        (0.5, 1, 1, 8, 1),  # 0.0625: a token in the batch leaves at least one place
        (1.0, 2, 0, 4, 0),
        (1.1, 1, 50, 1, 55),  # in floats 1.1 * 50 is 55.00000000000001, whose ceiling is 56
        (2.2, 1, 6_707_650, 1, 14_756_830),  # and here the float product is off by more than 1e-9
    ],
)
def test_capacity_by_hand(factor: float, num_selected: int, num_tokens: int, num_experts: int, places: int):
    assert expert_capacity(factor, num_selected, num_tokens, num_experts) == places


@repeatable(200)
@given(
    percent=st.integers(1, 400),
    num_selected=st.integers(1, 8),
    num_tokens=st.integers(0, 10**7),
    num_experts=st.integers(1, 256),
)
def test_capacity_is_the_exact_ceiling(percent: int, num_selected: int, num_tokens: int, num_experts: int):
    exact = math.ceil(Fraction(percent, 100) * num_selected * num_tokens / num_experts)
    assert expert_capacity(percent / 100, num_selected, num_tokens, num_experts) == exact
    assert oracle.capacity(percent / 100, num_selected, num_tokens, num_experts) == exact


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_capacity_factor_that_is_no_positive_number_is_refused(factor: float):
    with pytest.raises(UserError, match=f"capacity_factor {factor}; allowed: above 0"):
        expert_capacity(factor, 1, 8, 4)


@given(case=st.data())
@repeatable(200)
def test_a_plan_in_one_pass_is_the_plan_in_many(case: st.DataObject):
    num_tokens, num_experts = case.draw(st.integers(0, 12)), case.draw(st.integers(1, 6))
    places = case.draw(st.integers(1, 4))
    one = st.integers(-1, num_experts - 1)
    rows = case.draw(
        st.lists(st.lists(one, min_size=places, max_size=places), min_size=num_tokens, max_size=num_tokens)
    )
    experts = torch.tensor(rows, dtype=torch.int64).reshape(num_tokens, places)
    assignment = Assignment(experts, torch.ones(num_tokens, places), num_experts)
    found = make_plan(assignment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatewright.parts.dispatch.plan_rows", lambda *_: None)
        wanted = make_plan(assignment)
    assert (found.all_kept, found.weight_side) == (wanted.all_kept, wanted.weight_side)
    for name in ("token_ids", "counts", "slots"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
