"""A few tokens without gradient: the oracle's numbers at odd sizes, the same bits for every number of threads
and whatever stands beside a token, and linear maps that are torch's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.kernels import (
    ACTIVATIONS,
    ExpertWeights,
    apply_linears,
    expert_mlp,
    few_rows_linear,
    native,
    quantise,
)
from tests.kernels.plans import draw_inputs, draw_weights, plan_of, static_plan
from tests.kernels.test_native import drawn_places
from tests.kernels.variants import BOUND, leaves_of, near
from tests.oracle.experts import mixture
from tests.parts.harness import repeatable

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def in_int8(weights: ExpertWeights) -> ExpertWeights:
    """Return the weights with int8 matrices and fp32 biases."""
    (w_in, scale_in), (w_down, scale_down) = quantise(weights.w_in), quantise(weights.w_down)
    biases = (None if one is None else one.detach().float() for one in (weights.b_in, weights.b_down))
    return ExpertWeights(w_in, w_down, weights.activation, *biases, scale_in, scale_down)


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """Draw a case that crosses the borders of lanes, of rows read side by side, and of tasks."""
    num_experts = draw(st.integers(1, 5))
    num_tokens, num_selected = draw(st.integers(1, 8)), draw(st.integers(1, num_experts))
    return {
        "places": drawn_places(num_tokens, num_experts, num_selected, draw(st.sampled_from((0.0, 0.3)))),
        "num_experts": num_experts,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "width": draw(st.sampled_from((1, 7, 16, 33, 64, 70))),
        "hidden": draw(st.sampled_from((1, 3, 16, 19, 32, 67))),
        "side": draw(st.sampled_from(("output", "input"))),
        "biased": draw(st.booleans()),
        "static": draw(st.booleans()),
    }


def check(case: dict, dtype: torch.dtype, kept: torch.dtype) -> None:
    places, activation, side = case["places"], case["activation"], case["side"]
    plan = plan_of(places, case["num_experts"])
    plan = replace(static_plan(plan) if case["static"] else plan, weight_side=side)
    float_kept = torch.float32 if kept == torch.int8 else kept
    weights = draw_weights(
        activation, case["num_experts"], case["width"], case["hidden"], float_kept, case["biased"]
    )
    weights = in_int8(weights) if kept == torch.int8 else weights
    x, combine = draw_inputs(plan, case["width"], dtype)
    with torch.no_grad():
        y = expert_mlp(x, plan, combine, weights, "native")
        exact = {name: leaf.double() for name, leaf in leaves_of(weights.in_dtype(torch.float64)).items()}
        biases = {name: exact[name] for name in ("b_in", "b_down") if name in exact}
        w_in, w_down = exact["w_in"], exact["w_down"]
        expected = mixture(
            x.double(), places, combine.double(), w_in, w_down, activation, side=side, **biases
        )
    assert y.dtype == dtype
    near(y, expected, BOUND[dtype], "y", least=1.0)


@given(case=drawn(), kept=st.sampled_from((torch.float32, torch.int8)))
@repeatable(150)
def test_any_case_equals_the_oracle(case: dict, kept: torch.dtype):
    check(case, torch.float32, kept)


@given(case=drawn(), kept=st.sampled_from((torch.float32, torch.bfloat16, torch.int8)))
@repeatable(100)
def test_bf16_is_as_near_as_bf16_can_be(case: dict, kept: torch.dtype):
    check(case, torch.bfloat16, kept)


def several(dtype: torch.dtype, kept: torch.dtype, num_tokens: int = 8) -> tuple:
    """Return x, the places, combine weights and weights of 70 x 67 experts."""
    places = drawn_places(num_tokens, 6, 2)
    plan = plan_of(places, 6)
    weights = draw_weights("swiglu", 6, 70, 67, torch.float32 if kept == torch.int8 else kept)
    weights = in_int8(weights) if kept == torch.int8 else weights
    x, combine = draw_inputs(plan, 70, dtype)
    return x.detach(), places, combine.detach(), weights


@pytest.mark.parametrize(
    ("dtype", "kept"), [*PAIRS, (torch.float32, torch.int8), (torch.bfloat16, torch.int8)]
)
def test_a_token_is_the_same_whatever_stands_beside_it(dtype: torch.dtype, kept: torch.dtype):
    x, places, combine, weights = several(dtype, kept)
    with torch.no_grad():
        together = expert_mlp(x, plan_of(places, 6), combine, weights, "native")
        alone = [
            expert_mlp(x[t : t + 1], plan_of(places[t : t + 1], 6), combine[t : t + 1], weights, "native")
            for t in range(8)
        ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kept", [torch.float32, torch.int8])
def test_threads_change_no_bit(kept: torch.dtype):
    x, places, combine, weights = several(torch.float32, kept)
    before, found = torch.get_num_threads(), []
    maps = [torch.randn(33, 70), torch.randn(5, 70)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                y = expert_mlp(x, plan_of(places, 6), combine, weights, "native")
                found.append([y, *torch.ops.gatewright.few_rows_maps(x, maps)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_a_gradient_takes_the_other_path_to_the_same_numbers():
    x, places, combine, weights = several(torch.float32, torch.float32)
    with torch.no_grad():
        few = expert_mlp(x, plan_of(places, 6), combine, weights, "native")
    kept = expert_mlp(x, plan_of(places, 6), combine, weights, "native")
    assert kept.requires_grad
    near(few, kept.detach(), 1e-5)


def test_int8_for_many_tokens_and_without_native_is_what_its_numbers_say():
    x, places, combine, weights = several(torch.float32, torch.int8, 20)
    plan, wide = plan_of(places, 6), weights.in_dtype(torch.float32)
    with torch.no_grad():
        for backend in ("reference", "grouped", "padded", "native"):
            found = expert_mlp(x, plan, combine, weights, backend)
            near(found, expert_mlp(x, plan, combine, wide, "reference"), 1e-5, backend)


@pytest.mark.parametrize(("dtype", "kept"), PAIRS)
@pytest.mark.parametrize(("rows", "width", "sizes"), [(1, 1, (1,)), (3, 33, (17, 4)), (8, 100, (40, 1, 16))])
def test_maps_are_linear_maps(
    dtype: torch.dtype, kept: torch.dtype, rows: int, width: int, sizes: tuple[int, ...]
):
    torch.manual_seed(0)
    x, weights = torch.randn(rows, width).to(dtype), [torch.randn(n, width).to(kept) for n in sizes]
    for found, weight in zip(torch.ops.gatewright.few_rows_maps(x, weights), weights, strict=True):
        assert found.dtype == dtype
        near(found, x.double() @ weight.double().T, {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


def test_maps_of_more_tokens_or_with_gradients_are_torchs_own():
    weight, bias = torch.randn(5, 16, requires_grad=True), torch.randn(5)
    for x in (torch.randn(9, 16), torch.randn(2, 3, 16)):
        found = few_rows_linear(x, weight, bias)
        assert found.requires_grad
        with torch.no_grad():
            near(few_rows_linear(x, weight, bias), F.linear(x, weight, bias), 1e-6)
            with native.left_out():
                assert torch.equal(few_rows_linear(x, weight, bias), F.linear(x, weight, bias))


class Doubled(nn.Linear):
    """A linear map that somebody has changed."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_modules_that_are_more_than_a_linear_map_are_called():
    x, seen = torch.randn(2, 16), []
    plain, biased, doubled, hooked = (
        nn.Linear(16, 4, bias=False),
        nn.Linear(16, 4),
        Doubled(16, 4, bias=False),
        nn.Linear(16, 4, bias=False),
    )
    hooked.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        for other in (biased, doubled, hooked):
            for found, module in zip(apply_linears(x, (plain, other)), (plain, other), strict=True):
                near(found, module(x), 1e-6)
    assert len(seen) == 2


def arguments_of(weights: ExpertWeights, places: list[list[int]], **changed: Tensor | None) -> tuple:
    """Return the operator's arguments behind x and combine weights, some of the weights changed."""
    plan, words = plan_of(places, 6), ("w_in", "w_down", "scale_in", "scale_down", "b_in", "b_down")
    held = (changed.get(name, getattr(weights, name)) for name in words)
    return *held, plan.token_ids, plan.counts, plan.slots, weights.activation, False


def test_wrong_scales_and_shapes_are_refused():
    x, places, combine, weights = several(torch.float32, torch.int8)
    wrong = [
        {"scale_down": None},
        {"scale_in": torch.ones(6, 3)},
        {"scale_in": torch.ones(6, 134, dtype=torch.float64)},
        {"w_in": torch.ones(6, 134, 70), "w_down": torch.ones(6, 70, 67)},
        {"b_in": torch.ones(6, 134, dtype=torch.bfloat16)},
    ]
    for changed in wrong:
        with pytest.raises(ValueError, match=r"scale|dtypes"):
            torch.ops.gatewright.experts_few(x, combine, *arguments_of(weights, places, **changed))
    with pytest.raises(ValueError, match="one width"):
        torch.ops.gatewright.few_rows_maps(x, [torch.ones(3, 5)])


def test_compilers_know_the_shapes():
    x, places, combine, weights = several(torch.float32, torch.int8)
    checks = ("test_schema", "test_faketensor")
    operators, arguments = torch.ops.gatewright, (x, combine, *arguments_of(weights, places))
    torch.library.opcheck(operators.experts_few, arguments, test_utils=checks)
    torch.library.opcheck(operators.few_rows_maps, (x, [torch.ones(3, 70)]), test_utils=checks)
