"""Experts in int8: rounding within the stated bounds, and not far below them; what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.conversion import quantise_experts
from gatewright.errors import UserError
from gatewright.generation import generate
from gatewright.kernels import dequantise, native, quantise
from gatewright.parts import MLP, Experts, Int8Experts, MoELayer, RoutingCall, make_plan
from tests.parts.harness import repeatable
from tests.test_generation import PROMPT, build


@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 9), width=st.integers(1, 40), power=st.integers(-6, 6)
)
@repeatable(200)
def test_a_row_errs_by_half_its_scale_at_most(seed: int, rows: int, width: int, power: int):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw, dtype=torch.float64) * 10.0**power
    held, scale = quantise(weight)
    error = (weight - dequantise(held, scale, torch.float64)).abs()
    # The scale is rounded to fp32, so the largest number of a row may lie beyond 127 by 6e-8 of itself.
    assert (error <= scale.double().unsqueeze(1) * (0.5 + 1e-5)).all()
    assert held.abs().amax(dim=1).eq(127).all()


def test_a_linear_map_errs_within_the_bound_and_up_to_near_it():
    torch.manual_seed(0)
    weight = torch.randn(64, 256, dtype=torch.float64)
    held, scale = quantise(weight)
    wrong = weight - dequantise(held, scale, torch.float64)
    # Inputs whose signs are the errors' own: each row's worst case, which the bound overrates by about two.
    x = wrong.sign()
    error, bound = (x * wrong).sum(dim=1), scale.double() / 2 * x.abs().sum(dim=1)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error >= 0.4 * bound).all()


def bound_of_expert(x: torch.Tensor, experts: Experts, e: int) -> torch.Tensor:
    """Return the bound that kernels/int8.py states, of each output of expert e for one token x [D]."""
    w_in, w_down = experts.w_in[e].double(), experts.w_down[e].double()
    (_, s_in), (_, s_down) = quantise(experts.w_in[e]), quantise(experts.w_down[e])
    x, s_in, s_down = x.double(), s_in.double(), s_down.double()
    gate, up = (w_in @ x).chunk(2)
    of_gate, of_up = (s_in / 2 * x.abs().sum()).chunk(2)
    silu = torch.nn.functional.silu(gate)
    of_hidden = 1.1 * of_gate * (up.abs() + of_up) + silu.abs() * of_up
    halves = s_down.unsqueeze(1) / 2
    return (w_down.abs() + halves) @ of_hidden + halves.squeeze(1) * (silu * up).abs().sum()


def test_a_whole_expert_errs_within_its_bound_and_not_far_below():
    torch.manual_seed(0)
    layer = MoELayer(24, 3, 1, 16, weights="raw").double()
    experts, ratios = layer.experts, []
    other = Int8Experts(experts)
    for seed in range(40):
        x = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            plan = make_plan(layer.router.route(x, RoutingCall()).assignment)
            ones = torch.ones(1, 1).double()
            error = (experts(x, plan, ones) - other(x, plan, ones)).abs()[0]
            ratios.append(error / bound_of_expert(x[0], experts, int(plan.counts.argmax())))
    ratio = torch.stack(ratios)
    assert ratio.max() <= 1
    # Errors of random signs cancel, which a bound does not see.
    assert ratio.max() >= 0.05


def test_generation_with_int8_experts_is_that_of_their_numbers():
    model = build()
    spread = copy.deepcopy(model)
    for block in spread.layers:
        experts = block.feed_forward.experts
        with torch.no_grad():
            for weight in (experts.w_in, experts.w_down):
                weight.copy_(dequantise(*quantise(weight), torch.float32))
    assert quantise_experts(model) == len(model.layers)
    expected = generate(spread, PROMPT, max_new_tokens=32, temperature=0)
    assert generate(model, PROMPT, max_new_tokens=32, temperature=0) == expected
    assert generate(model, PROMPT, max_new_tokens=32, temperature=0, cache=False) == expected
    with native.left_out():
        assert generate(model, PROMPT, max_new_tokens=32, temperature=0) == expected


def test_scales_stay_exact_when_a_model_is_turned_into_bf16():
    layer = MoELayer(16, 4, 2, 8, expert_bias=True)
    quantise_experts(layer)
    before = layer.experts.scale_in.clone()
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.experts.w_in.dtype == torch.int8
    assert layer.experts.b_in.dtype == torch.float32
    assert torch.equal(layer.experts.scale_in, before)
    with torch.no_grad():
        y, _ = layer(torch.randn(3, 16).bfloat16())
    assert y.dtype == torch.bfloat16


def test_gradients_saving_and_models_without_experts_are_refused():
    layer = MoELayer(8, 4, 2, 8)
    quantise_experts(layer)
    with pytest.raises(UserError, match="with a gradient"):
        layer(torch.randn(3, 8))
    with pytest.raises(UserError, match="no state to save"):
        layer.state_dict()
    for model in (layer, MLP(4, 4)):
        with pytest.raises(UserError, match="without an MoELayer"):
            quantise_experts(model)
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, torch.inf]]))


def test_rows_of_zeros_and_no_columns_have_a_scale():
    held, scale = quantise(torch.zeros(2, 3))
    assert held.eq(0).all()
    assert scale.eq(1).all()
    assert quantise(torch.zeros(2, 0))[1].tolist() == [1.0, 1.0]
