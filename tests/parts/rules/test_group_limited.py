"""Group-limited choice and DeepSeek's routers: numbers worked by hand, the slow rule, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router
from gatewright.parts.rules.group_limited import GroupLimited
from gatewright.parts.scores import score_function
from gatewright.parts.selection_bias import SelectionBias
from tests.oracle import group_limited as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves


def chosen_by(rule: GroupLimited, *rows: list[float], mask: list[bool] | None = None):
    """Return the assignment of fp64 scores; logits are not looked at."""
    scores = torch.tensor(rows, dtype=torch.float64)
    call = RoutingCall(mask=None if mask is None else torch.tensor(mask))
    return rule(torch.full_like(scores, math.nan), scores, call)


def biased_by(*bias: float) -> SelectionBias:
    """Return a bias of these numbers."""
    module = SelectionBias(len(bias))
    module.bias.copy_(torch.tensor(bias))
    return module


def test_v2_keeps_the_group_with_the_best_expert_and_v3_the_one_with_the_best_two():
    # Groups (0, 1), (2, 3), (4, 5): best .9, .5, .6; two best .9, .95, .7.
    scores = [0.9, 0.0, 0.5, 0.45, 0.6, 0.1]
    by_best = chosen_by(GroupLimited(6, 2, 3, 1, "max"), scores)
    assert by_best.experts.tolist() == [[0, 1]]
    assert by_best.weights.tolist() == [[0.9, 0.0]]
    by_two = chosen_by(GroupLimited(6, 2, 3, 1, "top2"), scores)
    assert by_two.experts.tolist() == [[2, 3]]
    assert by_two.weights.tolist() == [[0.5, 0.45]]


def test_two_groups_of_three_by_hand():
    # Two best: .9, .95, .7, so expert 4 (.6) stays out though it is the second best of all.
    chosen = chosen_by(GroupLimited(6, 3, 3, 2, "top2"), [0.9, 0.0, 0.5, 0.45, 0.6, 0.1])
    assert chosen.experts.tolist() == [[0, 2, 3]]


def test_a_losing_group_does_not_win_where_all_biased_scores_are_negative():
    # Biased: -.8, -.9 | -.7, -.75. Zeroes in place of the losing group would be the highest.
    rule = GroupLimited(4, 2, 2, 1, "top2", bias=biased_by(-1, -1, -1, -1))
    chosen = chosen_by(rule, [0.2, 0.1, 0.3, 0.25])
    assert chosen.experts.tolist() == [[2, 3]]
    assert chosen.weights.tolist() == [[0.3, 0.25]]


def test_the_bias_selects_and_never_weighs():
    # Biased: .5, .3, .6: experts 2 and 0, with their own scores .2 and .5.
    bias = biased_by(0.0, 0.0, 0.4)
    raw = chosen_by(GroupLimited(3, 2, bias=bias), [0.5, 0.3, 0.2])
    assert raw.experts.tolist() == [[2, 0]]
    assert raw.weights.tolist() == [[0.2, 0.5]]
    # DeepSeek-V3 eq 13 and 16: g' / sum g' times 2.5.
    v3 = chosen_by(GroupLimited(3, 2, weights="renormalised", scale=2.5, bias=bias), [0.5, 0.3, 0.2])
    assert v3.weights[0].tolist() == pytest.approx([2.5 * 0.2 / 0.7, 2.5 * 0.5 / 0.7])


def test_the_bias_decides_between_groups_too():
    scores = [0.5, 0.4, 0.3, 0.2]
    assert chosen_by(GroupLimited(4, 1, 2, 1), scores).experts.tolist() == [[0]]
    lifted = GroupLimited(4, 1, 2, 1, bias=biased_by(0, 0, 0, 0.5))
    assert chosen_by(lifted, scores).experts.tolist() == [[3]]


def test_a_tiny_score_survives_a_large_bias():
    # In fp32 (1e-9 + 12) - 12 is 0: weights have to come from the scores.
    rule = GroupLimited(2, 1, bias=biased_by(12.0, 0.0))
    scores = torch.tensor([[1e-9, 0.9]])
    chosen = rule(scores, scores, RoutingCall())
    assert chosen.experts.tolist() == [[0]]
    assert chosen.weights.item() == pytest.approx(1e-9)


def test_among_equals_the_lowest_group_and_the_lowest_expert_go_first():
    chosen = chosen_by(GroupLimited(6, 2, 3, 2, "top2"), [0.5] * 6, [0.1, 0.1, 0.4, 0.2, 0.2, 0.4])
    # Token 1: groups of .2, .6, .6; experts .4, .2 | .2, .4: 2 before 5.
    assert chosen.experts.tolist() == [[0, 1], [2, 5]]
    assert chosen_by(GroupLimited(6, 2, 3, 1), [0.5] * 6).experts.tolist() == [[0, 1]]


def test_device_counts_are_tokens_and_not_choices():
    # Tokens choose 0, 1 (device 0 once); 0, 2 (devices 0, 1); padding; 4, 5 (device 2).
    rule = GroupLimited(6, 2, 3, 2)
    rows = [
        [0.9, 0.8, 0.3, 0.2, 0.1, 0.0],
        [0.9, 0.1, 0.8, 0.2, 0.1, 0.0],
        [0.9, 0.8, 0.3, 0.2, 0.1, 0.0],
        [0.1, 0.0, 0.2, 0.1, 0.8, 0.9],
    ]
    chosen = chosen_by(rule, *rows, mask=[True, True, False, True])
    assert chosen.experts.tolist() == [[0, 1], [0, 2], [-1, -1], [5, 4]]
    assert chosen.sums["device_counts"].tolist() == [2, 1, 1]
    assert chosen.sums["device_counts"].dtype == torch.int64


def test_v2_scales_what_it_does_not_renormalise():
    # exp of ln 5, ln 2, ln 2, 0 over 10: .5, .2, .2, .1; two chosen, times 16.
    router = build_router("deepseek_v2", 4, 4, 2, scale=16.0).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    logits = torch.tensor([[math.log(5), math.log(2), math.log(2), 0.0]], dtype=torch.float64)
    chosen = router.route(logits, RoutingCall()).assignment
    assert chosen.experts.tolist() == [[0, 1]]
    assert chosen.weights[0].tolist() == pytest.approx([8.0, 3.2])


def test_v4_by_hand():
    # sqrt(softplus): sqrt(ln 2) = .8326, sqrt(ln(1 + e)) = sqrt(1.3133) = 1.1460; over their sum, times 1.5.
    router = build_router("deepseek_v4", 2, 2, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    chosen = router.route(torch.tensor([[0.0, 1.0]], dtype=torch.float64), RoutingCall()).assignment
    assert chosen.experts.tolist() == [[1, 0]]
    assert chosen.weights[0].tolist() == pytest.approx([0.8688, 0.6312], abs=5e-5)


def test_scores_that_all_underflow_weigh_nothing():
    rule = GroupLimited(3, 2, weights="renormalised")
    logits = torch.full((1, 3), -200.0, requires_grad=True)
    chosen = rule(logits, torch.sigmoid(logits), RoutingCall())
    assert chosen.weights.tolist() == [[0.0, 0.0]]
    (1e9 * chosen.weights).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("name", "num_experts", "num_selected", "groups"),
    [
        ("deepseek_v3", 256, 8, (8, 4)),
        ("deepseek_v3", 16, 8, (8, 4)),
        ("deepseek_v3", 16, 9, (1, 1)),
        ("deepseek_v3", 20, 2, (1, 1)),
        ("deepseek_v3", 8, 2, (1, 1)),
        ("deepseek_v2", 160, 6, (8, 3)),
        ("deepseek_v4", 256, 6, (1, 1)),
        ("device_limited", 160, 6, (8, 3)),
        ("device_limited", 8, 2, (4, 3)),
        ("device_limited", 8, 7, (4, 4)),
        ("device_limited", 6, 2, (2, 2)),
        ("device_limited", 1, 1, (1, 1)),
    ],
)
def test_groups_are_the_published_ones_where_they_fit(name, num_experts, num_selected, groups):
    rule = build_router(name, 4, num_experts, num_selected).rule
    assert (rule.num_groups, rule.groups_kept) == groups


def test_the_deepseek_routers_are_what_the_papers_say():
    v3, moe = build_router("deepseek_v3", 4, 16, 4), build_router("deepseek_moe", 4, 16, 4)
    assert (v3.rule.group_score, v3.rule.weights, v3.rule.scale) == ("top2", "renormalised", 2.5)
    assert (v3.rule.bias.rate, v3.rule.bias.rule) == (0.001, "sign")
    assert set(v3.state_dict()) == {"weight", "rule.bias.bias", "rule.bias.updates"}
    assert (moe.rule.weights, moe.rule.scale) == ("raw", 1.0)
    v2 = build_router("deepseek_v2", 4, 16, 4).rule
    assert (v2.group_score, v2.weights, v2.scale, v2.bias) == ("max", "raw", 1.0, None)
    v2.update(torch.zeros(16, dtype=torch.int64), 0)
    v3.rule.update(torch.arange(16), 30)
    assert v3.rule.bias.bias[0] > 0 > v3.rule.bias.bias[15]


@dataclass(frozen=True)
class Example:
    """One rule on a few tokens."""

    num_tokens: int
    num_groups: int
    size: int
    groups_kept: int
    num_selected: int
    group_score: str
    weights: str
    scale: float
    kind: str
    biased: bool
    rounded: bool
    masked: bool
    seed: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.num_groups * self.size


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw a rule that is allowed; scores are rounded, so that they tie, in one case of three."""
    num_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    groups_kept = draw(st.integers(1, num_groups))
    num_selected = draw(st.integers(1, min(groups_kept * size, 6)))
    raw = num_selected == 1 < num_groups * size
    return Example(
        draw(st.integers(0, 4)),
        num_groups,
        size,
        groups_kept,
        num_selected,
        draw(st.sampled_from(("max", "top2"))),
        "raw" if raw else draw(st.sampled_from(("raw", "renormalised"))),
        draw(st.sampled_from((1.0, 2.5, 16.0))),
        draw(st.sampled_from(("softmax", "sigmoid", "sqrt_softplus"))),
        draw(st.booleans()),
        draw(st.integers(0, 2)) == 0,
        draw(st.booleans()),
        draw(st.integers(0, 10_000)),
    )


@repeatable(200)
@given(example=examples())
def test_it_is_the_slow_rule_in_choices_weights_and_gradients(example: Example):
    source = torch.Generator().manual_seed(example.seed)
    shape = (example.num_tokens, example.num_experts)
    logits = 2 * torch.randn(shape, generator=source, dtype=torch.float64)
    logits = logits.round() if example.rounded else logits
    mask = torch.rand(example.num_tokens, generator=source) < 0.7 if example.masked else None
    # Eighths from -2 to 2: exact in fp32, and often below every score's negative.
    bias = torch.randint(-16, 17, (example.num_experts,), generator=source) / 8
    if not example.biased:
        bias = torch.zeros(example.num_experts)
    rule = GroupLimited(
        example.num_experts,
        example.num_selected,
        example.num_groups,
        example.groups_kept,
        example.group_score,
        example.weights,
        example.scale,
        biased_by(*bias.tolist()) if example.biased else None,
    )
    ours, theirs = leaves(logits)
    found = rule(ours, score_function(example.kind)(ours), call_of(mask))
    real = [True] * example.num_tokens if mask is None else mask.tolist()
    expected, chosen = [], []
    for t in range(example.num_tokens):
        if not real[t]:
            expected.append(([], []))
            continue
        scores = oracle.scores_of(example.kind, list(theirs[t]))
        groups = (example.num_groups, example.groups_kept, example.group_score)
        experts = oracle.choose(scores, bias.tolist(), example.num_selected, *groups)
        chosen.append(experts)
        expected.append((experts, oracle.weigh(scores, experts, example.weights, example.scale)))
    assert_same(found, expected, [(ours, theirs)])
    if example.num_groups > 1:
        counts = oracle.device_counts(chosen, example.num_experts, example.num_groups)
        assert found.sums["device_counts"].tolist() == counts


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "device_limited"])
def test_no_token_goes_to_more_groups_than_it_keeps(name: str):
    torch.manual_seed(0)
    layer = MoELayer(8, 32, 6, 4, router=name)
    _, stats = layer(torch.randn(64, 8), capture=True)
    record, rule = stats["router"], layer.router.rule
    visited = [len({e // 4 for e in row}) for row in record.experts.tolist()]
    assert max(visited) == rule.groups_kept < 6
    assert int(record.sums["device_counts"].sum()) == sum(visited)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_any_dtype_and_no_tokens(dtype: torch.dtype, num_tokens: int):
    rule = GroupLimited(4, 2, 2, 1, "top2", "renormalised", bias=SelectionBias(4))
    scores = torch.rand(num_tokens, 4).to(dtype)
    chosen = rule(scores, scores, RoutingCall())
    assert chosen.weights.dtype == dtype
    assert chosen.experts.shape == (num_tokens, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_groups": 3}, "num_groups 3 with num_experts 8; allowed: divisors of 8"),
        ({"num_groups": 0}, "num_groups 0"),
        ({"num_groups": 4, "groups_kept": 1, "num_selected": 3}, "groups_kept 1 with num_selected 3"),
        ({"num_groups": 4, "groups_kept": 5}, "groups_kept 5"),
        ({"group_score": "top3"}, "did you mean 'top2'"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"weights": "softmax_selected"}, "softmax_selected"),
        ({"weights": "renormalised", "num_selected": 1}, "no gradient"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        GroupLimited(**{"num_experts": 8, "num_selected": 2, **options})


def test_groups_without_how_many_are_kept_are_refused():
    with pytest.raises(UserError, match="allowed: both or neither"):
        build_router("deepseek_v3", 4, 32, 4, num_groups=4)
    rule = build_router("deepseek_v3", 4, 8, 4, num_groups=4, groups_kept=2).rule
    assert (rule.num_groups, rule.groups_kept) == (4, 2)
