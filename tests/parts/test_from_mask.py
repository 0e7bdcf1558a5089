"""from_mask: a choice given as a mask, ranked by weight, in both of its ways."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.parts import from_mask, routing
from tests.parts.harness import repeatable


def test_a_mask_becomes_places_in_falling_order_of_weight():
    # Token 0 uses experts 0, 2 and 3 with weights 1, 5, 5: 2 before 3 (the lower id), then 0. Token 1: none.
    chosen = torch.tensor([[True, False, True, True], [False] * 4])
    weights = torch.tensor([[1.0, 9.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    made = from_mask(chosen, weights)
    assert made.experts.tolist() == [[2, 3, 0], [-1, -1, -1]]
    assert made.weights.tolist() == [[5.0, 5.0, 1.0], [0.0, 0.0, 0.0]]
    assert from_mask(chosen, weights, places=2).experts.tolist() == [[2, 3], [-1, -1]]


@repeatable(200)
@given(st.data())
def test_sorting_the_choices_and_sorting_the_rows_are_one_thing(data: st.DataObject):
    num_tokens, num_experts = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    places = data.draw(st.none() | st.integers(1, num_experts))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    chosen = torch.rand(num_tokens, num_experts, generator=draw) < share
    weights = torch.randint(0, 4, (num_tokens, num_experts), generator=draw).double()
    kept = routing._SPARSE
    try:
        routing._SPARSE = 1
        by_choice = from_mask(chosen, weights, places)
        routing._SPARSE = 10**9
        by_row = from_mask(chosen, weights, places)
    finally:
        routing._SPARSE = kept
    assert torch.equal(by_choice.experts, by_row.experts)
    assert torch.equal(by_choice.weights, by_row.weights)
