"""Biases, weights on the input, dropout, static plans: every backend against the oracle and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.kernels import (
    ACTIVATIONS,
    ExpertWeights,
    expert_mlp,
    expert_mlp_sorted,
    runnable_backends,
)
from tests.kernels.plans import draw_inputs, draw_weights, plan_of, static_plan
from tests.kernels.variants import compare, leaves_of, near, scale_of
from tests.oracle.experts import mixture
from tests.parts.harness import repeatable

each_backend = pytest.mark.parametrize("backend", runnable_backends())
# Experts 0 and 3 stay empty; token 2 loses one choice, token 4 both, token 5 has its expert twice.
PLACES = [[1, 2], [2, 4], [4, -1], [2, 1], [-1, -1], [4, 4]]


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("static", [False, True])
def test_variants_equal_the_oracle(backend: str, activation: str, side: str, static: bool):
    for biased in (False, True):
        compare(PLACES, 5, backend, activation, side=side, static=static, biased=biased, capacity=4)
        compare(PLACES, 5, backend, activation, side=side, static=static, biased=biased, dropped=True)


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """Draw a small case."""
    num_tokens, num_experts = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    num_places = draw(st.integers(1, num_experts))
    ids = st.lists(st.integers(0, num_experts - 1), min_size=num_places, max_size=num_places, unique=True)
    token = st.builds(
        lambda row, gone: [-1 if lost else e for e, lost in zip(row, gone, strict=True)],
        ids,
        st.tuples(*[st.booleans()] * num_places) | st.just((False,) * num_places),
    )
    places = draw(st.lists(token, min_size=num_tokens, max_size=num_tokens))
    most = max((sum(row.count(e) for row in places) for e in range(num_experts)), default=0)
    return {
        "places": places,
        "num_experts": num_experts,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "width": draw(st.integers(1, 8)),
        "hidden": draw(st.integers(1, 8)),
        "side": draw(st.sampled_from(("output", "input"))),
        "biased": draw(st.booleans()),
        "dropped": draw(st.booleans()),
        "static": draw(st.booleans()),
        "capacity": draw(st.none() | st.integers(most, most + 2)),
        "dtype": draw(st.sampled_from((torch.float64, torch.float64, torch.float32))),
    }


@given(case=drawn())
@repeatable(250)
def test_any_variant_equals_the_oracle(case: dict):
    for backend in runnable_backends():
        # Only the native kernels sum in another order than torch: there, cancelled sums keep what they lost.
        own_sums = backend == "native" and case["dtype"] == torch.float32
        compare(backend=backend, least=1.0 if own_sums else 1e-2, **case)


@each_backend
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variants_where_grouped_matmuls_run(backend: str, side: str, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(3)
    experts = torch.rand(40, 8, generator=draw)[:, :7].argsort(dim=1)[:, :3]
    places = torch.where(torch.rand(40, 3, generator=draw) < 0.3, -1, experts).tolist()
    # bf16 rounds each row's weight before the sum: compared with the reference in bf16 as well.
    for static in (False, True):
        if dtype == torch.float32:
            compare(places, 8, backend, "swiglu", width=16, hidden=8, side=side, static=static, dtype=dtype)
            continue
        results = {}
        for one in ("reference", backend):
            plan = replace(plan_of(places, 8), weight_side=side)
            plan = replace(static_plan(plan), weight_side=side) if static else plan
            weights = draw_weights("swiglu", 8, 16, 8, dtype, True)
            x, combine = draw_inputs(plan, 16, dtype)
            y = expert_mlp(x, plan, combine, weights, one)
            named = {"x": x, "combine": combine, **leaves_of(weights)}
            grads = torch.autograd.grad(y.float().square().mean(), list(named.values()))
            results[one] = [y.detach(), *grads]
        for one, other in zip(results[backend], results["reference"], strict=True):
            near(one, other.double(), 3e-2)


@each_backend
def test_biases_by_hand(backend: str):
    # One token x = 2 through experts with w_in 1, w_down 3 and ReLU. Expert 0: b_in 1, b_down 10 gives
    # 3 (2 + 1) + 10 = 19; expert 1: b_in -5, b_down 4 gives 3 * 0 + 4 = 4. y = 0.5 * 19 + 0.25 * 4 = 10.5.
    # Expert 2 gets nothing: where every token meets all experts, `everyone` computes them.
    weights = ExpertWeights(
        torch.ones(3, 1, 1), torch.full((3, 1, 1), 3.0), "relu",
        torch.tensor([[1.0], [-5.0], [9.0]]), torch.tensor([[10.0], [4.0], [9.0]]).requires_grad_(),
    )  # fmt: skip
    combine = torch.tensor([[0.5, 0.25]])
    y = expert_mlp(torch.tensor([[2.0]]), plan_of([[0, 1]], 3), combine, weights, backend)
    assert y.item() == 10.5
    (grad,) = torch.autograd.grad(y, weights.b_down)
    assert grad.tolist() == [[0.5], [0.25], [0.0]]


@each_backend
def test_a_weight_on_the_input_by_hand(backend: str):
    # Llama-4: x = 2 with score 0.5 enters as 1. Expert: relu(x - 0.5) * 4 + 1 = 3; on the output it would
    # be 0.5 * (4 * 1.5 + 1) = 3.5. dy/dw = 4 * x = 8.
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    bias = torch.full((1, 1), -0.5, dtype=torch.float64)
    weights = ExpertWeights(one, 4 * one, "relu", bias, torch.ones(1, 1, dtype=torch.float64))
    x = torch.full((1, 1), 2.0, dtype=torch.float64)
    combine = torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    plan = plan_of([[0]], 1)
    assert expert_mlp(x, plan, combine, weights, backend).item() == 3.5
    y = expert_mlp(x, replace(plan, weight_side="input"), combine, weights, backend)
    assert y.item() == 3.0
    y.backward()
    assert combine.grad is not None
    assert combine.grad.item() == 8.0


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_behind_the_last_expert_mean_nothing(backend: str, dtype: torch.dtype):
    # They belong to a token that holds NaN, which no kept choice reads.
    places = [[0, 1], [-1, -1], [1, -1]]
    results = []
    for behind in (1.0, math.nan):
        plan = plan_of(places, 2)
        plan = static_plan(plan)
        plan.token_ids[3:] = 1
        weights = draw_weights("swiglu", 2, 4, 4, dtype, biased=True)
        x, combine = draw_inputs(plan, 4, dtype)
        with torch.no_grad():
            x[1] = behind
        scale = torch.ones(6, 4, dtype=dtype)
        y = expert_mlp(x, plan, combine, weights, backend, scale)
        leaves = [combine, *leaves_of(weights).values()]
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        assert (y[1] == 0).all()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@each_backend
def test_sorted_rows_take_biases_and_scales(backend: str):
    weights = draw_weights("clamped_swiglu", 3, 4, 5, biased=True)
    rows = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plan = plan_of([[0], [0], [2], [2]], 3)
    scale, scales = scale_of(plan, [[0], [0], [2], [2]], 5)
    out = expert_mlp_sorted(rows, plan.counts, weights, backend, scale)
    expected = mixture(
        rows, [[0], [0], [2], [2]], torch.ones(4, 1, dtype=torch.float64), weights.w_in, weights.w_down,
        "clamped_swiglu", b_in=weights.b_in, b_down=weights.b_down, scales=scales,
    )  # fmt: skip
    near(out, expected, 1e-12)


def test_more_rows_than_the_plan_promises_are_refused():
    weights = draw_weights("relu", 2, 3, 3)
    for plan in (plan_of([[1, 1]], 2), replace(plan_of([[1], [1]], 2), capacity=1)):
        x, combine = draw_inputs(plan, 3)
        with pytest.raises(
            UserError, match=r"an expert has 2 rows, the plan promises 1; allowed: one row per token"
        ):
            expert_mlp(x, plan, combine, weights, "padded")


def test_a_second_backward_pass_sees_the_same_numbers():
    plan = plan_of(PLACES, 5)
    for activation in ACTIVATIONS:
        weights = draw_weights(activation, 5, 4, 3, biased=True)
        x, combine = draw_inputs(plan, 4)
        y = expert_mlp(x, plan, combine, weights, "grouped").sum()
        leaves = (x, combine, weights.w_in, weights.w_down)
        first = torch.autograd.grad(y, leaves, retain_graph=True)
        second = torch.autograd.grad(y, leaves)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)


@each_backend
def test_many_empty_places_change_nothing(backend: str):
    # Two choices per token among 40 places: the same rows as with two places.
    places = [[1, 2], [2, 0], [0, 1]]
    wide = [[-1] * 17 + row + [-1] * 21 for row in places]
    weights = draw_weights("gelu", 3, 4, 4)
    x, combine = draw_inputs(plan_of(places, 3), 4)
    spread = torch.zeros(3, 40, dtype=torch.float64)
    spread[:, 17:19] = combine.detach()
    y = expert_mlp(x, plan_of(places, 3), combine, weights, backend)
    near(expert_mlp(x, plan_of(wide, 3), spread, weights, backend), y.detach(), 1e-14)
