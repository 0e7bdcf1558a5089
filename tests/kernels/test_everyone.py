"""All experts for all tokens, as one wide layer: the reference's numbers, and only where it may be used."""

from __future__ import annotations

import pytest
import torch

from gatewright.kernels import ExpertWeights, grouped, reference
from gatewright.kernels.everyone import is_everyone
from gatewright.parts import Assignment, make_plan


def case(num_tokens: int, num_experts: int, activation: str, biased: bool, dtype=torch.float64):
    """Return (x, plan, combine weights, expert weights); every token has an order of its own."""
    draw = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=draw).argsort(dim=1)
    gates = torch.rand(num_tokens, num_experts, generator=draw).to(dtype)
    rows = 6 if activation in ("swiglu", "geglu", "clamped_swiglu") else 3

    def leaf(*shape: int):
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    biases = (leaf(num_experts, rows), leaf(num_experts, 5)) if biased else (None, None)
    weights = ExpertWeights(leaf(num_experts, rows, 5), leaf(num_experts, 5, 3), activation, *biases)
    return (
        leaf(num_tokens, 5),
        make_plan(Assignment(ids, gates, num_experts)),
        gates.requires_grad_(),
        weights,
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu", "linear", "clamped_swiglu"])
@pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
def test_output_and_gradients_are_the_reference_s(activation: str, biased: bool):
    x, plan, gates, weights = case(7, 4, activation, biased)
    assert is_everyone(plan)
    leaves = [x, gates, weights.w_in, weights.w_down, *([weights.b_in, weights.b_down] if biased else [])]
    results = []
    for backend in (reference, grouped):
        y = backend.expert_mlp(x, plan, gates, weights)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * direction).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_by_hand():
    # Two linear experts on numbers: 2 x and 5 x; x = 3, shares 1/4 and 3/4: 6 / 4 + 45 / 4 = 12.75.
    weights = ExpertWeights(torch.tensor([[[2.0]], [[5.0]]]), torch.ones(2, 1, 1), "linear")
    plan = make_plan(Assignment(torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]), 2))
    y = grouped.expert_mlp(torch.tensor([[3.0]]), plan, torch.tensor([[0.75, 0.25]]), weights)
    assert y.item() == pytest.approx(12.75)


@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [([[0, 0], [1, 1]], 2), ([[0, 1], [0, -1]], 2), ([[0, 1], [1, 0]], 3), ([[0], [0]], 1)],
    ids=["one expert twice", "an empty place", "not all experts", "a single expert"],
)
def test_it_is_not_taken_for_anything_less(ids: list[list[int]], num_experts: int):
    experts = torch.tensor(ids)
    assert not is_everyone(make_plan(Assignment(experts, torch.ones(experts.shape), num_experts)))


def test_dropped_choices_and_weights_on_the_input_go_the_usual_way():
    experts, ones = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2)
    assert is_everyone(make_plan(Assignment(experts, ones, 2)))
    assert not is_everyone(make_plan(Assignment(experts, ones, 2), 1))
    assert not is_everyone(make_plan(Assignment(experts, ones, 2, "input")))
    assert not is_everyone(make_plan(Assignment(experts, ones, 2), static=True))
