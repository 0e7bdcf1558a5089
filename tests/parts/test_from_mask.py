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


@repeatable(200)
@given(st.data())
def test_it_says_what_the_mask_says(data: st.DataObject):
    num_tokens, num_experts = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 20))
    places = data.draw(st.none() | st.integers(1, num_experts))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
    chosen = torch.rand(num_tokens, num_experts, generator=draw) < share
    # Few values, negative ones among them, so that many tie.
    weights = torch.randint(-2, 3, (num_tokens, num_experts), generator=draw).to(dtype).requires_grad_()
    made = from_mask(chosen, weights, places)

    expected = []
    for t in range(num_tokens):
        ids = [e for e in range(num_experts) if chosen[t, e]]
        ids.sort(key=lambda e, t=t: (-weights[t, e].item(), e))
        expected.append(ids[:places])
    width = max(1, *(len(ids) for ids in expected)) if expected and places is None else places or 1
    assert made.experts.shape == made.weights.shape == (num_tokens, width)
    assert made.num_experts == num_experts
    assert made.weights.dtype == dtype
    assert made.experts.tolist() == [ids + [-1] * (width - len(ids)) for ids in expected]
    # The gradient of each place goes to the pair of token and expert that fills it, and nowhere else.
    factors = torch.arange(1, 1 + made.weights.numel()).view(num_tokens, width).to(dtype)
    (gradient,) = torch.autograd.grad((made.weights * factors).sum(), weights)
    wanted = torch.zeros_like(gradient)
    for t, ids in enumerate(expected):
        for k, e in enumerate(ids):
            assert made.weights[t, k] == weights[t, e]
            wanted[t, e] = factors[t, k]
        assert not made.weights[t, len(ids) :].any()
    assert torch.equal(gradient, wanted)


def test_no_choice_at_all_keeps_one_empty_place():
    made = from_mask(torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4))
    assert made.experts.tolist() == [[-1]] * 3
    assert made.weights.tolist() == [[0.0]] * 3
    assert from_mask(torch.zeros(0, 4, dtype=torch.bool), torch.ones(0, 4)).experts.shape == (0, 1)
