"""ST-MoE's top-n: the first choice always, later ones by coin or threshold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import Capacity, MoELayer, build_router
from gatewright.parts.rules import threshold_second
from gatewright.parts.rules.threshold_second import ThresholdSecond, later_choice_coins
from tests.oracle import threshold_second as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens


@pytest.fixture
def coins(monkeypatch):
    """Return a function that fixes the coin numbers [T, n - 1]."""

    def fix(*rows: list[float]) -> None:
        numbers = torch.tensor(rows)
        monkeypatch.setattr(threshold_second, "later_choice_coins", lambda *_: numbers)

    return fix


# p = (.4, .1, .3, .2): the three best are .4, .3, .2 with sum .9, so g = 4/9, 3/9, 2/9.
SCORES = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64)
SHARES = [4 / 9, 3 / 9, 2 / 9]


def chosen_by(rule: ThresholdSecond, training: bool = True):
    """Return the assignment of the token above."""
    return rule(SCORES.log(), SCORES, call_of(training=training))


def test_a_later_choice_is_used_with_probability_g_over_the_threshold(coins):
    # Threshold .5: g2 / .5 = 2/3 and g3 / .5 = 4/9 against u = .66 and .45.
    coins([0.66, 0.45])
    chosen = chosen_by(ThresholdSecond(3, 0.5))
    assert chosen.experts.tolist() == [[0, 2, -1]]
    # The weights were normalised over all three, and stay so.
    assert chosen.weights[0].tolist() == pytest.approx([4 / 9, 3 / 9, 0])
    assert chosen.withdrawn is None


def test_a_rejected_second_choice_leaves_the_third_its_chance(coins):
    coins([0.67, 0.44])
    assert chosen_by(ThresholdSecond(3, 0.5)).experts.tolist() == [[0, -1, 3]]


def test_at_the_papers_threshold_a_share_above_it_is_always_used(coins):
    # g2 = 3/9 and g3 = 2/9 are both above .2, so that no coin can reject them.
    coins([0.999999, 0.999999])
    assert chosen_by(ThresholdSecond(3)).experts.tolist() == [[0, 2, 3]]


def test_the_threshold_policy_flips_no_coin():
    # 3/9 >= .3 > 2/9, in training and in evaluation.
    for training in (True, False):
        chosen = chosen_by(ThresholdSecond(3, 0.3, "threshold"), training)
        assert chosen.experts.tolist() == [[0, 2, -1]]
    # A share at the threshold is used: p = (.5, .25, .25), two of three: g2 = .25 / .75.
    even = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    rule = ThresholdSecond(2, 0.5, "threshold")
    assert rule(even.log(), even, call_of()).experts.tolist() == [[0, 1]]


def test_when_the_coin_is_flipped(coins):
    coins([0.99, 0.99])
    for coin, training, flips in (
        ("train", True, True),
        ("train", False, False),
        ("always", False, True),
        ("never", True, False),
    ):
        chosen = chosen_by(ThresholdSecond(3, 1.0, coin=coin), training)
        assert chosen.experts.tolist() == ([[0, -1, -1]] if flips else [[0, 2, 3]]), (coin, training)
    assert chosen_by(ThresholdSecond(3, 1.0, "all")).experts.tolist() == [[0, 2, 3]]


def test_literal_counters_name_the_expert_of_a_rejected_choice(coins):
    coins([0.99, 0.0])
    chosen = chosen_by(ThresholdSecond(3, 1.0, counters="literal"))
    assert chosen.experts.tolist() == [[0, 2, 3]]
    assert chosen.withdrawn.tolist() == [[False, True, False]]
    assert chosen.weights[0].tolist() == pytest.approx(SHARES)


def test_the_coin_is_fair():
    # g = 4/9, 3/9, 2/9 at threshold .5: 2/3 and 4/9 of 20000 tokens. Four standard deviations: .0134, .0141.
    scores = SCORES.expand(20_000, 4)
    used = ThresholdSecond(3, 0.5)(scores.log(), scores, call_of(key=5)).experts >= 0
    share = used.double().mean(dim=0)
    assert share[0] == 1
    assert abs(share[1] - 2 / 3) < 0.0134
    assert abs(share[2] - 4 / 9) < 0.0141
    # The two coins of a token are independent: both used in 2/3 * 4/9 = 8/27 of the tokens.
    assert abs((used[:, 1] & used[:, 2]).double().mean() - 8 / 27) < 0.0130


def test_the_paper_s_capacity_comes_with_the_router():
    router = build_router("st_moe", 8, 4, 2)
    assert router.capacity == Capacity(1.25, eval_factor=2.0, order="rank")
    layer = MoELayer(8, 4, 2, 4, router="st_moe")
    # 16 tokens: ceil(1.25 * 2 * 16 / 4) = 10 places in training, 16 in evaluation.
    places = [layer.capacity.places(2, 16, 4, training) for training in (True, False)]
    assert places == [10, 16]


def test_padding_and_a_single_expert():
    chosen = ThresholdSecond(2)(torch.zeros(3, 2), torch.full((3, 2), 0.5), call_of(torch.zeros(3) > 0))
    assert (chosen.experts == -1).all()
    one = ThresholdSecond(1)(torch.zeros(3, 1), torch.ones(3, 1), call_of())
    assert one.experts.tolist() == [[0], [0], [0]]


@repeatable(250)
@given(
    case=routed_tokens(2),
    threshold=st.sampled_from((0.05, 0.2, 0.31, 0.5, 1.0)),
    policy=st.sampled_from(("random", "random", "threshold", "all")),
    coin=st.sampled_from(("train", "always", "never")),
    counters=st.sampled_from(("compact", "literal")),
    data=st.data(),
)
def test_equals_the_oracle(case, threshold, policy, coin, counters, data):
    logits, mask = case
    num_selected, training = data.draw(st.integers(2, logits.shape[1])), data.draw(st.booleans())
    ours, theirs = leaves(logits)
    call = call_of(mask, training, key=data.draw(st.integers(0, 100)))
    numbers = later_choice_coins(call, logits.shape[0], num_selected - 1, logits.device)
    flips = coin == "always" or (coin == "train" and training)
    expected, left_out = [], []
    for t, row in enumerate(theirs):
        own = numbers[t].tolist() if flips else None
        ids, weights, used = oracle.top_n(list(row), num_selected, threshold, policy, own)
        real = mask is None or bool(mask[t])
        kept = [i for i in range(num_selected) if real and (used[i] or counters == "literal")]
        expected.append(([ids[i] for i in kept], [weights[i] for i in kept]))
        left_out.append([real and not used[i] for i in range(num_selected)])
    rule = ThresholdSecond(num_selected, threshold, policy, coin, counters)
    found = rule(ours, torch.softmax(ours, -1), call)
    assert_same(found, expected, [(ours, theirs)])
    if counters == "literal" and found.withdrawn is not None:
        assert ((found.experts >= 0) & found.withdrawn).tolist() == left_out
    elif counters == "literal":
        assert not any(map(any, left_out))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, r"threshold 0.0; allowed: above 0, up to 1"),
        ({"threshold": math.nan}, r"threshold nan; allowed: above 0, up to 1"),
        ({"policy": "rndom"}, "policy 'rndom' is unknown; did you mean 'random'"),
        ({"coin": "training"}, "coin 'training' is unknown; did you mean 'train'"),
        ({"counters": "exact"}, "counters 'exact' is unknown.*allowed: compact, literal"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        build_router("st_moe", 8, 4, 2, **options)


def test_a_constant_gate_is_refused():
    with pytest.raises(UserError, match="num_selected 1 with weights 'renormalised'"):
        build_router("st_moe", 8, 4, 1)
