"""Group-limited choice: numbers worked by hand, the slow rule, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import RoutingCall
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


def test_scores_that_all_underflow_weigh_nothing():
    rule = GroupLimited(3, 2, weights="renormalised")
    logits = torch.full((1, 3), -200.0, requires_grad=True)
    chosen = rule(logits, torch.sigmoid(logits), RoutingCall())
    assert chosen.weights.tolist() == [[0.0, 0.0]]
    (1e9 * chosen.weights).sum().backward()
    assert torch.isfinite(logits.grad).all()


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
