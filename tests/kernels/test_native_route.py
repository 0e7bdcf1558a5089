"""The native router: the torch path's choices, numbers and gradients, and the same bits however it is run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.kernels import FusedRoute, TopK, fused_route, native, rank_rows
from gatewright.kernels.native import route as native_route
from gatewright.parts import MoELayer, Routed, RoutingCall, Stats, balance_loss, make_plan, z_loss
from gatewright.parts.record import record_call
from gatewright.parts.rules.group_limited import GroupLimited
from gatewright.parts.rules.token_choice import TokenChoice
from gatewright.parts.scores import SCORES, native_name, probabilities
from gatewright.parts.selection_bias import SelectionBias
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)

NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 3.4e38, math.inf, -math.inf, math.nan, -math.nan)
NAMES = ("weights", "score_sums", "logsumexp_sum", "logsumexp_square_sum")


def rule_of(case: dict[str, Any], bias: Tensor | None) -> TokenChoice | GroupLimited:
    """Return the rule that the torch path runs, and that says itself what the operator shall do."""
    if bias is None:
        return TokenChoice(case["K"], case["weights"], case["scale"])
    own = SelectionBias(case["E"])
    own.bias = bias
    return GroupLimited(case["E"], case["K"], weights=case["weights"], scale=case["scale"], bias=own)


def slow(case: dict[str, Any], logits: Tensor, bias: Tensor | None, mask: Tensor | None) -> FusedRoute:
    """Return what the rule and the record say of logits in fp64, by torch's operators alone."""
    call, function = RoutingCall(mask), SCORES[case["scores"]]
    scores = function(logits)
    own = rule_of(case, bias)(logits, scores, call)
    shares = probabilities(function, logits, scores)
    record = record_call(Routed(logits, scores, shares, own), make_plan(own), mask, case["group"], False)
    return FusedRoute(
        own.weights,
        own.experts,
        record.group_score_sums,
        record.logsumexp_sum,
        record.logsumexp_square_sum,
        record.nonfinite,
        record.group_counts,
        record.group_first_counts,
    )


def fast(case: dict[str, Any], logits: Tensor, bias: Tensor | None, mask: Tensor | None) -> FusedRoute:
    top = rule_of(case, bias).as_top_k()
    found = fused_route(logits, case["scores"], top, mask, case["group"])
    assert found is not None
    return found


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sizes around the panels of 16 tokens and 16 experts, a rule, and numbers with many ties."""
    experts = draw(st.sampled_from((1, 2, 3, 8, 15, 16, 17, 33, 64)))
    selected = draw(st.integers(1, min(experts, 8)) | st.just(experts))
    scores = draw(st.sampled_from(("softmax", "sigmoid", "identity")))
    biased = scores != "identity" and draw(st.booleans())
    forms = ["raw"]
    if selected > 1 or experts == 1:
        forms += [] if scores == "identity" else ["renormalised"]
        forms += [] if biased else ["softmax_selected"]
    return {
        "T": draw(st.sampled_from((0, 1, 2, 15, 16, 17, 40, 257, 300))),
        "E": experts,
        "K": selected,
        "scores": scores,
        "weights": draw(st.sampled_from(forms)),
        "scale": draw(st.sampled_from((1.0, 2.5))),
        "biased": biased,
        "masked": draw(st.booleans()),
        "group": draw(st.sampled_from((None, 1, 7, 16, 100, 1000))),
        "step": draw(st.sampled_from((0.0, 0.25, 1.0))),
        "seed": draw(st.integers(0, 99)),
    }


def tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Draw logits in whole steps (all equal for a step of 0), a bias of both signs, and a mask."""
    draw = torch.Generator().manual_seed(case["seed"])
    logits = (torch.randn(case["T"], case["E"], generator=draw) * 4).round() * case["step"]
    bias = torch.randn(case["E"], generator=draw) if case["biased"] else None
    mask = torch.rand(case["T"], generator=draw) < 0.7 if case["masked"] else None
    return logits, bias, mask


@given(drawn())
@repeatable(250)
def test_equals_the_torch_path_in_fp64(case: dict[str, Any]):
    logits, bias, mask = tensors(case)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = fast(case, ours, bias, mask), slow(case, theirs, bias, mask)
    for name in ("experts", "nonfinite", "counts", "first_counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    total, slow_total = ours.sum() * 0, theirs.sum() * 0
    draw = torch.Generator().manual_seed(1)
    for name in NAMES:
        own, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(own.double(), other, rtol=2e-6, atol=1e-5, msg=name)
        factor = torch.randn(own.shape, generator=draw)
        total, slow_total = total + (own * factor).sum(), slow_total + (other * factor.double()).sum()
    total.backward()
    slow_total.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=3e-5)


@given(st.lists(st.lists(st.sampled_from(NUMBERS), min_size=6, max_size=6), max_size=20), st.integers(1, 6))
@repeatable(200)
def test_the_best_of_a_row_are_those_that_ranking_puts_first(rows: list[list[float]], count: int):
    scores = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 6)
    found = native_route.select_top(scores, count)
    assert torch.equal(found, rank_rows(scores)[:, :count])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "identity"])
def test_rows_that_are_not_finite(scores: str):
    rows = [
        [1.0, -math.inf, 0.5, -math.inf],
        [-math.inf] * 4,
        [0.0, math.inf, 1.0, math.inf],
        [math.nan, 1.0, -1.0, 0.0],
        [1.0, 2.0, math.nan, math.inf],
        [-200.0, 0.0, -300.0, -250.0],
        [0.0, 1.0, 2.0, 3.0],
    ]
    logits, weights = torch.tensor(rows), "softmax_selected" if scores == "identity" else "renormalised"
    case = {"E": 4, "K": 3, "scores": scores, "weights": weights, "scale": 1.0, "group": None}
    found, expected = fast(case, logits, None, None), slow(case, logits, None, None)
    assert torch.equal(found.experts, expected.experts)
    assert found.nonfinite.item() == 5
    torch.testing.assert_close(found.weights, expected.weights, equal_nan=True)
    for row in rows:
        one, other = (run(case, torch.tensor([row]), None, None) for run in (fast, slow))
        for name in NAMES:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), equal_nan=True, msg=name)


def test_among_equals_the_first_is_taken_and_biases_never_weigh():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), 0.0, 0.0]])
    found = fused_route(logits, "softmax", TopK(2, "raw"))
    assert found.experts.tolist() == [[0, 1], [1, 0]]
    assert found.counts.tolist() == [[2, 2, 0, 0]]
    biased = fused_route(logits, "softmax", TopK(2, "raw", bias=torch.tensor([-9.0, -9.0, 0.0, 1.0])))
    assert biased.experts.tolist() == [[3, 2], [3, 2]]
    torch.testing.assert_close(biased.weights, torch.tensor([[0.25, 0.25], [1 / 6, 1 / 6]]))


def test_the_balance_loss_reaches_every_score():
    # One token, p = (3/4, 1/4): dp_0/dl = p_0 (1 - p_0), -p_0 p_1; nothing else is asked for.
    logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    fused_route(logits, "softmax", TopK(1, "raw")).score_sums[0, 0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[3 / 16, -3 / 16]]))


@pytest.mark.parametrize("form", ["raw", "renormalised", "softmax_selected"])
def test_rows_are_those_of_the_oracle(form: str):
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    logits[::3] = logits[::3].round()
    found = fused_route(logits, "softmax", TopK(3, form))
    totals, squares = torch.zeros(7).double(), 0.0
    for t, row in enumerate(logits.double()):
        one = list(row.unbind())
        scores = oracle.softmax(one)
        chosen = oracle.best(scores, 3)
        assert found.experts[t].tolist() == chosen
        expected = torch.stack(oracle.gates(one, chosen, form))
        torch.testing.assert_close(found.weights[t].double(), expected, rtol=1e-6, atol=1e-6)
        totals += torch.stack(scores)
        squares += float(oracle.log_sum_exp(one)) ** 2
    torch.testing.assert_close(found.score_sums[0].double(), totals, rtol=1e-6, atol=1e-6)
    assert found.logsumexp_square_sum.item() == pytest.approx(squares)


@pytest.mark.parametrize("router", ["token_choice", "deepseek_v3", "loss_free", "gpt_oss", "noisy_top_k"])
def test_a_layer_gives_what_it_gives_without(router: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    layer = MoELayer(8, 6, 2, 4, router=router)
    with torch.no_grad():
        layer.router.weight.normal_()
    x, mask = torch.randn(3, 20, 8), torch.rand(3, 20) < 0.8
    results = []
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(native_route, "takes", lambda *_: False)
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        y, stats = layer(mine, mask=mask, key=torch.tensor(3), capture=True)
        loss = y.square().sum() + balance_loss(stats) + z_loss(stats) + balance_loss(stats, "sequence")
        loss.backward()
        record = {name: value for name, value in vars(stats["router"]).items() if isinstance(value, Tensor)}
        results.append({"y": y, "x": mine.grad, "weight": layer.router.weight.grad} | record)
    assert results[0].keys() == results[1].keys()
    assert {"logits", "scores", "experts", "combine_weights", "group_score_sums"} <= results[0].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


@pytest.mark.parametrize(("scores", "weights"), [("softmax", "renormalised"), ("sigmoid", "raw")])
def test_the_same_bits_for_every_number_of_threads_and_neighbour(scores: str, weights: str):
    torch.manual_seed(0)
    logits, bias = torch.randn(1300, 24), torch.randn(24)
    top, threads = TopK(3, weights, bias=bias), torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3, 4, 1):
            torch.set_num_threads(count)
            mine = logits.clone().requires_grad_()
            found = fused_route(mine, scores, top, None, 500)
            (found.weights.square().sum() + found.score_sums.square().sum()).backward()
            seen.append([*vars(found).values(), mine.grad])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))
    alone = fused_route(logits[777:778], scores, top)
    assert torch.equal(alone.weights, seen[0][0][777:778])


def test_recomputation_gives_equal_bits():
    torch.manual_seed(0)
    layer, x = MoELayer(8, 6, 2, 4), torch.randn(40, 8)
    found = []
    for again in (False, True):
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        y, stats = checkpoint(layer, mine, use_reentrant=False) if again else layer(mine)
        (y.square().sum() + balance_loss(stats)).backward()
        found.append([y, mine.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("group", [0, 5])
def test_the_operators_describe_themselves(group: int):
    logits = torch.randn(12, 6).requires_grad_()
    mask, bias = torch.rand(12) < 0.7, torch.randn(6)
    given_ = (logits, mask, bias, 2, "sigmoid", "renormalised", 2.5, 1e-20, False, group)
    torch.library.opcheck(torch.ops.gatewright.route.default, given_)
    torch.library.opcheck(torch.ops.gatewright.select_top.default, (logits.detach(), 3))
    kept = torch.ops.gatewright.route(*given_)
    groups = kept[2].shape[0]
    came = (torch.randn(12, 2), torch.randn(groups, 6), torch.ones(()), None)
    backward = (*came, logits.detach(), kept[8], kept[9].detach(), mask, 2, *given_[4:8], group)
    torch.library.opcheck(torch.ops.gatewright.route_backward.default, backward)


def test_what_does_not_fit_is_refused():
    run = torch.ops.gatewright.route
    with pytest.raises(ValueError, match="num_selected 4; allowed: 1 to 3"):
        run(torch.zeros(2, 3), None, None, 4, "softmax", "raw", 1.0, 0.0, False, 0)
    with pytest.raises(ValueError, match="allowed: softmax, sigmoid, identity"):
        run(torch.zeros(2, 3), None, None, 1, "cosine", "raw", 1.0, 0.0, False, 0)
    with pytest.raises(ValueError, match=r"mask \[3\]"):
        run(torch.zeros(2, 3), torch.ones(3).bool(), None, 1, "softmax", "raw", 1.0, 0.0, False, 0)


def test_who_is_not_plain_says_nothing():
    class Other(TokenChoice):
        def __call__(self, *given: Any) -> Any:
            return super().__call__(*given)

    assert TokenChoice(2).as_top_k() == TopK(2, "renormalised")
    assert Other(2).as_top_k() is TokenChoice(2, weight_side="input").as_top_k() is None
    assert GroupLimited(8, 2, 4, 2).as_top_k() is None
    assert GroupLimited(8, 2, bias=SelectionBias(8)).as_top_k() is not None
    assert native_name(torch.softmax) is None
    for other in (torch.zeros(2, 3).double(), torch.zeros(2, 3).bfloat16()):
        assert fused_route(other, "softmax", TopK(1, "raw")) is None
    assert fused_route(torch.zeros(2, 3), None, TopK(1, "raw")) is None
    assert fused_route(torch.zeros(2, 3), "softmax", None) is None


def test_stats_of_other_groups_are_counted_anew():
    torch.manual_seed(0)
    layer, x = MoELayer(8, 4, 2, 4), torch.randn(12, 8)
    routed = layer.router.route(x, RoutingCall(stats_size=12))
    record = record_call(routed, make_plan(routed.assignment), None, 6, False)
    assert record.group_counts.shape == record.group_score_sums.shape == (2, 4)
    assert Stats({"router": record})["router"].counts.sum() == 24
