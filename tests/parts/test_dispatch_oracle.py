"""Queues, plans and rerouting against slow loops: all orders, groups, padding, withdrawn choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewright.kernels import DispatchPlan
from gatewright.parts import Assignment, make_plan
from gatewright.parts.capacity import ORDERS
from gatewright.parts.dispatch import queue_positions
from gatewright.parts.groups import num_groups
from gatewright.parts.reroute import reroute
from gatewright.parts.router import Routed
from tests.oracle import dispatch as oracle
from tests.parts.harness import repeatable


@dataclass(frozen=True)
class Drawn:
    """Choices for the library and for the oracle; `scores` [T, E] all differ, `limits` is C per group."""

    assignment: Assignment
    queue: oracle.Queue
    scores: Tensor
    limits: list[int]
    seed: int

    @property
    def options(self) -> dict:
        """What the library's functions take."""
        return {"group_size": self.queue.group_size, "order": self.queue.order}

    def limit(self) -> int | Tensor:
        """Return C as one number where all groups have the same, else as a tensor."""
        return self.limits[0] if len(set(self.limits)) == 1 else torch.tensor(self.limits)


@st.composite
def drawn(draw: st.DrawFn, duplicates: bool = True) -> Drawn:
    """Draw choices with empty places; weights often tie; some are withdrawn."""
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    places = draw(st.integers(1, 4 if duplicates else num_experts))
    seed = draw(st.integers(0, 10_000))
    dice = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=dice, dtype=torch.float64)
    if draw(st.booleans()):
        scores[:, 0] += 1  # a crowd
    ids = torch.argsort(scores, dim=1, descending=True)[:, :places]
    if duplicates:
        ids = torch.randint(num_experts, (num_tokens, places), generator=dice)
    empty = torch.rand(num_tokens, places, generator=dice) < draw(st.sampled_from((0.0, 0.3)))
    padding = torch.rand(num_tokens, 1, generator=dice) < draw(st.sampled_from((0.0, 0.3)))
    experts = torch.where(empty | padding, -1, ids)
    weights = torch.randint(-2, 3, (num_tokens, places), generator=dice).double()
    gone = torch.rand(num_tokens, places, generator=dice) < draw(st.sampled_from((0.0, 0.0, 0.3)))
    withdrawn = gone & (experts >= 0)
    size, order = draw(st.none() | st.integers(1, 10)), draw(st.sampled_from(ORDERS))
    groups = num_groups(num_tokens, size)
    limits = draw(st.lists(st.integers(0, 5), min_size=groups, max_size=groups))
    if draw(st.booleans()):
        limits = limits[:1] * groups
    assignment = Assignment(experts, weights, num_experts, withdrawn=withdrawn if withdrawn.any() else None)
    queue = oracle.Queue(experts.tolist(), weights.tolist(), withdrawn.tolist(), num_experts, size, order)
    return Drawn(assignment, queue, scores, limits if num_tokens else limits[:1], seed)


def served(case: Drawn) -> tuple[list[list[int]], list[list[bool]]]:
    """Return the oracle's queue positions and who is kept."""
    return oracle.serve(case.queue, case.limits if case.queue.rows else [])


@repeatable(300)
@given(case=drawn())
def test_queue_positions_equal_a_count(case: Drawn):
    ahead, _ = served(case)
    found = queue_positions(case.assignment, **case.options)
    assert found.dtype == torch.int64
    made = case.assignment.experts >= 0
    assert torch.where(made, found, -1).tolist() == ahead


def check_plan(plan: DispatchPlan, rows: list[list[int]], kept: list[list[bool]], num_experts: int) -> None:
    """Hold a dynamic plan against who is kept: rows by expert and, inside an expert, in position order."""
    order = [
        (t, rank)
        for e in range(num_experts)
        for t, row in enumerate(rows)
        for rank, chosen in enumerate(row)
        if kept[t][rank] and chosen == e
    ]
    assert plan.token_ids.tolist() == [t for t, _ in order]
    row_of = {place: row for row, place in enumerate(order)}
    assert plan.slots.tolist() == [
        [row_of.get((t, rank), -1) for rank in range(len(row))] for t, row in enumerate(rows)
    ]
    assert plan.counts.tolist() == [sum(rows[t][rank] == e for t, rank in order) for e in range(num_experts)]
    assert plan.all_kept == all(all(row) for row in kept)


@repeatable(300)
@given(case=drawn())
def test_plans_keep_whom_a_count_keeps(case: Drawn):
    _, kept = served(case)
    check_plan(
        make_plan(case.assignment, case.limit(), **case.options),
        case.queue.rows,
        kept,
        case.assignment.num_experts,
    )


@repeatable(300)
@given(case=drawn(), dropless=st.booleans())
def test_a_static_plan_says_the_same_in_shapes_that_do_not_depend_on_it(case: Drawn, dropless: bool):
    limit = None if dropless else case.limit()
    plan = make_plan(case.assignment, limit, **case.options)
    static = make_plan(case.assignment, limit, static=True, **case.options)
    assert torch.equal(static.slots, plan.slots)
    assert torch.equal(static.counts, plan.counts)
    assert static.token_ids.shape == (case.assignment.experts.numel(),)
    assert torch.equal(static.token_ids[: plan.token_ids.shape[0]], plan.token_ids)
    assert sorted(static.token_ids.tolist()) == [t for t, row in enumerate(case.queue.rows) for _ in row], (
        "a row for every place"
    )
    assert not static.all_kept
    assert static.capacity == plan.capacity
    if static.capacity is not None:
        assert not plan.counts.numel() or plan.counts.max() <= static.capacity


@repeatable(300)
@given(case=drawn(duplicates=False))
def test_rerouting_ends_where_the_loops_end(case: Drawn):
    routed = Routed(case.scores, case.scores, case.scores, case.assignment)
    sent, kept = reroute(routed, case.limit(), case.queue.group_size, case.queue.order)  # type: ignore[arg-type]
    rows, held = oracle.reroute(case.queue, case.scores.tolist(), case.limits if case.queue.rows else [])
    assert sent.experts.tolist() == rows
    assert kept.tolist() == held
    own, scores = case.queue.rows, case.scores.tolist()
    for t, row in enumerate(rows):
        for rank, e in enumerate(row):
            weight, before = case.queue.weights[t][rank], own[t][rank]
            if e != before:
                weight = weight * scores[t][e] / scores[t][before]
            assert abs(sent.weights[t, rank].item() - weight) <= 1e-12 * max(1, abs(weight))
    options = {"static": False, "kept": kept, **case.options}
    check_plan(make_plan(sent, case.limit(), **options), rows, held, case.assignment.num_experts)
    static = make_plan(sent, case.limit(), **{**options, "static": True})
    assert (static.slots >= 0).tolist() == held
    for e in range(case.assignment.num_experts):
        assert static.capacity is None or static.counts[e] <= static.capacity


def test_long_queues_are_sorted_another_way_and_alike():
    # From 8192 keys on: small integers and a radix sort, wider ones for E * G beyond 255 and 32767.
    dice = torch.Generator().manual_seed(0)
    for num_experts, size in ((5, None), (64, 512), (300, 100)):
        ids = torch.randint(-1, num_experts, (10_000, 3), generator=dice)
        assignment = Assignment(ids, torch.rand(10_000, 3, generator=dice), num_experts)
        group = (
            torch.zeros(10_000, 1, dtype=torch.int64)
            if size is None
            else torch.arange(10_000)[:, None] // size
        )
        queue = torch.where(ids < 0, -1, ids + num_experts * group)
        for order, line in (("position", queue.flatten()), ("rank", queue.t().flatten())):
            expected = torch.zeros_like(line)
            seen: dict[int, int] = {}
            for place, key in enumerate(line.tolist()):
                expected[place] = seen.get(key, 0)
                seen[key] = seen.get(key, 0) + 1
            expected = expected.view(10_000, 3) if order == "position" else expected.view(3, 10_000).t()
            found = queue_positions(assignment, size, order)  # type: ignore[arg-type]
            assert torch.equal(found[ids >= 0], expected[ids >= 0])
            for limit in (2, 40):
                plan = make_plan(assignment, limit, group_size=size, order=order)  # type: ignore[arg-type]
                assert torch.equal(plan.slots >= 0, (ids >= 0) & (expected < limit))
                owner = torch.repeat_interleave(torch.arange(num_experts), plan.counts)
                kept = plan.slots >= 0
                assert torch.equal(owner[plan.slots[kept]], ids[kept])
                token = torch.arange(10_000)[:, None].expand_as(ids)
                assert torch.equal(plan.token_ids[plan.slots[kept]], token[kept])
                assert (torch.diff(owner * 10_000 + plan.token_ids) >= 0).all()
