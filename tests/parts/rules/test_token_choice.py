"""Token choice as an object: its scale, its weight side, and its two names."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import MoELayer, Router, TokenChoice, build_router, token_choice
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens

# exp of the logits is 3, 1, 5, 2, of sum 11.
LOGITS = torch.tensor([[math.log(3), 0.0, math.log(5), math.log(2)]], dtype=torch.float64)


def test_the_scale_multiplies_every_form_of_weight():
    # Twice 5/11 and 3/11 raw; twice 5/8 and 3/8 in both normalised forms, which then sum to 2.
    scores = torch.softmax(LOGITS, -1)
    for form, expected in (
        ("raw", [10 / 11, 6 / 11]),
        ("renormalised", [10 / 8, 6 / 8]),
        ("softmax_selected", [10 / 8, 6 / 8]),
    ):
        chosen = TokenChoice(2, form, scale=2.0)(LOGITS, scores, call_of())
        assert chosen.experts.tolist() == [[2, 0]]
        assert chosen.weights[0].tolist() == pytest.approx(expected)


def test_a_scaled_sigmoid_gate_by_hand():
    # DeepSeek-V3's weights: sigmoid scores 3/4, 1/2, 5/6; 5/6 and 3/4 share 10/19 and 9/19, times 2.5.
    logits = torch.tensor([[math.log(3), 0.0, math.log(5)]], dtype=torch.float64)
    chosen = TokenChoice(2, "renormalised", scale=2.5)(logits, torch.sigmoid(logits), call_of())
    assert chosen.experts.tolist() == [[2, 0]]
    assert chosen.weights[0].tolist() == pytest.approx([25 / 19, 22.5 / 19])


def test_the_weight_side_is_handed_on():
    scores = torch.softmax(LOGITS, -1)
    assert TokenChoice(2)(LOGITS, scores, call_of()).weight_side == "output"
    assert TokenChoice(2, weight_side="input")(LOGITS, scores, call_of()).weight_side == "input"


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_weight_on_the_input_goes_through_the_expert(side: str):
    # x = (ln 3, 0), gates 3/4 and 1/4; both experts are swiglu with gate = up = z: f(z) = silu(z) z.
    # Output side: 3/4 f(x) + 1/4 f(x) = f(x). Input side: f(3/4 x) + f(1/4 x).
    router = Router(2, 2, rule=TokenChoice(2, "raw", weight_side=side))
    layer = MoELayer(2, 2, 2, 1, router=router).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
        layer.experts.w_in.copy_(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]] * 2))
        layer.experts.w_down.copy_(torch.tensor([[[1.0], [0.0]]] * 2))
    y, _ = layer(torch.tensor([[math.log(3), 0.0]], dtype=torch.float64))

    def f(z: float) -> float:
        return z * z / (1 + math.exp(-z))

    x = math.log(3)
    expected = f(x) if side == "output" else f(3 / 4 * x) + f(1 / 4 * x)
    assert y[0].tolist() == pytest.approx([expected, 0.0])


@repeatable(200)
@given(case=routed_tokens(), data=st.data())
def test_equals_the_oracle(case, data):
    logits, mask = case
    num_experts = logits.shape[1]
    num_selected = data.draw(st.integers(1, num_experts))
    forms = ("raw",) if num_selected == 1 < num_experts else ("raw", "renormalised", "softmax_selected")
    form, scale = data.draw(st.sampled_from(forms)), data.draw(st.sampled_from((1.0, 2.5, 0.3)))
    ours, theirs = leaves(logits)
    expected = []
    for t, row in enumerate(theirs):
        ids = oracle.best(list(row), num_selected) if mask is None or mask[t] else []
        expected.append((ids, [scale * gate for gate in oracle.gates(list(row), ids, form)] if ids else []))
    found = TokenChoice(num_selected, form, scale)(ours, torch.softmax(ours, -1), call_of(mask))
    assert_same(found, expected, [(ours, theirs)])


def test_the_two_names_differ_in_their_weights():
    for name, form in (("token_choice", "renormalised"), ("token_choice_raw", "raw")):
        router = build_router(name, 4, 4, 2)
        assert (router.rule.weights, router.rule.scale, router.bias) == (form, 1.0, None)
    assert build_router("token_choice_raw", 4, 4, 2, scale=16.0).rule.scale == 16.0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_above_zero_is_refused(scale: float):
    with pytest.raises(UserError, match="allowed: above 0; 1 leaves the weights as they are"):
        TokenChoice(2, scale=scale)


def test_bad_selections_are_refused_when_the_router_is_built():
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4; allowed: 1 to 4"):
        build_router("token_choice", 8, 4, 5)
    with pytest.raises(UserError, match="num_selected 1 with weights 'renormalised'"):
        build_router("token_choice", 8, 4, 1)
    with pytest.raises(UserError, match="num_selected 1 with weights 'softmax_selected'"):
        token_choice(LOGITS, LOGITS, 1, "softmax_selected")
