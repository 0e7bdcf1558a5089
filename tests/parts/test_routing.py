"""Selection rules: numbers worked by hand from the papers' equations, ties, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.kernels.native import route as native_route
from gatewright.parts import Router, check_selection, select_top, softmax_scores, token_choice
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable

LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)
NAN, INF = math.nan, math.inf


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose by the native operator where there is one, and by torch's alone."""
    if request.param == "torch":
        monkeypatch.setattr(native_route, "takes", lambda *_: False)
    return request.param


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Return fp64 logits [T, E]."""
    return torch.tensor(rows, dtype=torch.float64)


def test_the_router_is_one_linear_map_without_bias():
    # Switch eq 1: h(x) = W_r x. W_r = [[1, 2], [0, 3], [-1, 1]], x = [2, 5]: 2 + 10, 15, -2 + 5.
    router = Router(2, 3)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 3.0], [-1.0, 1.0]]))
    assert router(torch.tensor([[2.0, 5.0]])).tolist() == [[12.0, 15.0, 3.0]]
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_softmax_scores_by_hand():
    # exp of ln 2, ln 5, 0, ln 2 is 2, 5, 1, 2; their sum is 10.
    scores = softmax_scores(logits_of([LN2, LN5, 0.0, LN2]))
    assert scores.tolist()[0] == pytest.approx([0.2, 0.5, 0.1, 0.2])


def test_switch_takes_the_best_expert_with_its_raw_score():
    # Switch eq 2-3 with K = 1: expert argmax p, weight p itself (not 1).
    logits = logits_of([LN2, LN5, 0.0, LN2], [0.0, 0.0, LN2, 0.0])
    chosen = token_choice(logits, softmax_scores(logits), 1, "raw")
    assert chosen.experts.tolist() == [[1], [2]]
    assert chosen.weights.flatten().tolist() == pytest.approx([5 / 10, 2 / 5])
    assert (chosen.num_tokens, chosen.num_selected, chosen.num_experts) == (2, 1, 4)


@pytest.mark.parametrize("form", ["renormalised", "softmax_selected"])
def test_mixtral_weights_sum_to_one(form):
    # Softmax(Top2(x W_g)): the chosen logits ln 5 and ln 3 give 5 / 8 and 3 / 8, whatever the others are.
    logits = logits_of([LN3, 0.0, LN5, LN2])
    chosen = token_choice(logits, softmax_scores(logits), 2, form)
    assert chosen.experts.tolist() == [[2, 0]]
    assert chosen.weights.tolist()[0] == pytest.approx([5 / 8, 3 / 8])


def test_olmoe_keeps_the_raw_scores():
    # OLMoE eq 1: softmax over all (3 + 1 + 5 + 2 = 11), no renormalisation: 5 / 11 + 3 / 11 < 1.
    logits = logits_of([LN3, 0.0, LN5, LN2])
    chosen = token_choice(logits, softmax_scores(logits), 2, "raw")
    assert chosen.experts.tolist() == [[2, 0]]
    assert chosen.weights.tolist()[0] == pytest.approx([5 / 11, 3 / 11])


def test_softmax_over_selected_reads_the_logits_not_the_scores():
    # Scores that are no softmax choose experts 1 and 2; the weights come from their logits 0 and ln 3.
    logits, scores = logits_of([LN5, 0.0, LN3]), logits_of([0.1, 0.9, 0.8])
    chosen = token_choice(logits, scores, 2, "softmax_selected")
    assert chosen.experts.tolist() == [[1, 2]]
    assert chosen.weights.tolist()[0] == pytest.approx([1 / 4, 3 / 4])
    renormalised = token_choice(logits, scores, 2, "renormalised")
    assert renormalised.weights.tolist()[0] == pytest.approx([9 / 17, 8 / 17])


def test_the_weights_carry_gradient_and_the_choice_none():
    # d p_1 / d logits for p = (1/4, 1/2, 1/4) and expert 1 chosen: -p_1 p_0, p_1 (1 - p_1), -p_1 p_2.
    logits = logits_of([0.0, LN2, 0.0]).requires_grad_()
    chosen = token_choice(logits, softmax_scores(logits), 1, "raw")
    assert not chosen.experts.requires_grad
    (grad,) = torch.autograd.grad(chosen.weights.sum(), logits)
    assert grad.tolist()[0] == pytest.approx([-1 / 8, 1 / 4, -1 / 8])


def test_all_experts_selected_is_the_dense_mixture():
    logits = logits_of([LN2, LN5, 0.0])
    chosen = token_choice(logits, softmax_scores(logits), 3, "raw")
    assert chosen.experts.tolist() == [[1, 0, 2]]
    assert chosen.weights.sum().item() == pytest.approx(1)


def test_padding_leaves_its_places_empty():
    logits = logits_of([LN2, 0.0], [0.0, LN2], [0.0, LN2])
    mask = torch.tensor([True, False, True])
    chosen = token_choice(logits, softmax_scores(logits), 1, "raw", mask)
    assert chosen.experts.tolist() == [[0], [-1], [1]]


@pytest.mark.parametrize("num_selected", [1, 2, 3, 16, 17, 40])
def test_equal_scores_choose_the_lowest_ids(way: str, num_selected: int):
    # Both ways of selecting (passes up to 16, one stable sort above); torch.topk gives other ids here.
    scores = torch.full((3, 40), 0.025)
    assert select_top(scores, num_selected).tolist() == [list(range(num_selected))] * 3


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.4, 0.4, 0.1], [1, 2, 0]),
        ([0.4, 0.1, 0.1, 0.4], [0, 3, 1]),
        ([0.1, 0.1, 0.7, 0.1], [2, 0, 1]),
        ([-INF, 0.2, -INF, 0.2], [1, 3, 0]),
        ([-INF, -INF, -INF, -INF], [0, 1, 2]),
        ([-1.0, -3.0, -2.0, -3.0], [0, 2, 1]),
        ([0.5, NAN, 0.9, NAN], [1, 3, 2]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2]),
        ([INF, 0.5, INF, 0.1], [0, 2, 1]),
        ([NAN, -INF, INF, -INF], [0, 2, 1]),
    ],
)
def test_order_by_hand(way: str, scores: list[float], expected: list[int]):
    assert select_top(torch.tensor([scores]), 3).tolist() == [expected]
    # Beside a row that holds -inf, which changes the way of selecting.
    both = select_top(torch.tensor([scores, [-INF, 1.0, 2.0, 3.0]]), 3)
    assert both.tolist() == [expected, [3, 2, 1]]


@repeatable(200)
@given(data=st.data(), num_experts=st.integers(1, 40), num_tokens=st.integers(0, 4))
def test_selection_equals_the_oracle_where_many_scores_tie(data, num_experts: int, num_tokens: int):
    num_selected = data.draw(st.integers(1, num_experts))
    values = st.sampled_from((-INF, -1.0, 0.0, 0.25, 0.5, 1.0))
    row = st.lists(values, min_size=num_experts, max_size=num_experts)
    rows = data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    scores = torch.tensor(rows, dtype=torch.float32).reshape(num_tokens, num_experts)
    expected = [oracle.best(list(row), num_selected) for row in scores]
    assert select_top(scores, num_selected).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ties_in_wide_rows_and_strided_memory(dtype: torch.dtype):
    # 300 experts hold 3 distinct scores each token; wide rows take torch's vectorised paths.
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (300, 5), generator=draw).to(dtype).t()
    expected = [oracle.best(list(row), 7) for row in scores.double()]
    assert select_top(scores, 7).tolist() == expected
    assert select_top(scores.contiguous(), 7).tolist() == expected


@pytest.mark.parametrize("form", ["renormalised", "softmax_selected"])
def test_one_selected_expert_with_normalised_weights_is_refused(form: str):
    with pytest.raises(
        UserError, match="every gate exactly 1, so the router gets no gradient; use weights 'raw'"
    ):
        check_selection(4, 1, form)
    logits = logits_of([0.0, 1.0])
    with pytest.raises(UserError, match="router gets no gradient"):
        token_choice(logits, softmax_scores(logits), 1, form)
    # With a single expert there is nothing to route.
    check_selection(1, 1, form)


@pytest.mark.parametrize(("num_experts", "num_selected"), [(4, 5), (4, 0), (4, -1), (1, 2)])
def test_more_experts_than_there_are_is_refused(num_experts: int, num_selected: int):
    with pytest.raises(
        UserError,
        match=f"num_selected {num_selected} with num_experts {num_experts}; allowed: 1 to {num_experts}; ",
    ):
        check_selection(num_experts, num_selected, "raw")


def test_no_experts_are_refused():
    with pytest.raises(UserError, match="num_experts 0; allowed: 1 or more"):
        check_selection(0, 1, "raw")


def test_an_unknown_weight_form_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"weights 'renormalized' is unknown; did you mean 'renormalised'\?; allowed: raw"
    ):
        check_selection(4, 2, "renormalized")
