"""The routers whose noise or coins are handed in, and ReMoE: cases by hand, definitions, known mistakes."""

from __future__ import annotations

import math

from gatewright.testing.cases import Case, Row, powers
from gatewright.testing.rule import Rule
from gatewright.testing.slow_noisy import (
    Coined,
    NoisySums,
    NoisyTopK,
    Penalty,
    Positive,
    TwoLevels,
    TwoLevelSums,
)


def below(clean: float, threshold: float) -> float:
    """Return Phi(ln(clean / threshold) / ln 2), for logits that are logarithms and noise of spread ln 2."""
    return (1 + math.erf(math.log2(clean / threshold) / math.sqrt(2))) / 2


def _rows(*values: float) -> tuple[Row, ...]:
    return (tuple(map(float, values)),)


_NONE = (0.0, 0.0, 0.0, 0.0)
# softplus(0) = ln 2: noise n multiplies the power of a logit by 2^n.
NOISY_TOP_K = (
    # 4, 2, 1, 1/2 times 2^-2, 1, 2^3, 1 are 1, 2, 8, 1/2. Of the others, the second highest is 2 to experts 0
    # and 3, and 1 to experts 1 and 2; clean 4, 2, 1, 1/2 stand against those.
    Case(
        "4, 2, 1, 1/2 with noise -2, 0, 3, 0: the noise decides, and weighs",
        (powers(4, 2, 1, 0.5),),
        2,
        ({2: 8 / 10, 1: 2 / 10},),
        {"noise": _rows(-2, 0, 3, 0), "noise_logits": (_NONE,)},
        sums={
            "importance": (0.0, 0.2, 0.8, 0.0),
            "load": (below(4, 2), below(2, 1), below(1, 1), below(0.5, 2)),
        },
    ),
    # softplus(ln 3) = ln 4: there n = 1 multiplies by 4.
    Case(
        "1, 1, 3 with noise 1, 0, 0 of spread ln 4, ln 2, ln 2: 4 and 3 share 1",
        (powers(1, 1, 3),),
        2,
        ({0: 4 / 7, 2: 3 / 7},),
        {"noise": _rows(1, 0, 0), "noise_logits": _rows(math.log(3), 0, 0)},
    ),
    Case(
        "3, 1, 5, 2 without noise: 5 and 3 share 1",
        (powers(3, 1, 5, 2),),
        2,
        ({2: 5 / 8, 0: 3 / 8},),
        {"noise": (_NONE,), "noise_logits": (_NONE,)},
    ),
    Case(
        "all of 2, 5, 1 with noise 1, 0, 0: loads are counts",
        (powers(2, 5, 1),),
        3,
        ({1: 5 / 10, 0: 4 / 10, 2: 1 / 10},),
        {"noise": _rows(1, 0, 0), "noise_logits": _rows(0, 0, 0)},
        sums={"importance": (0.4, 0.5, 0.1), "load": (1.0, 1.0, 1.0)},
    ),
)
# Groups 3, 1, 2 with noise 0, 2, 0 are 3, 4, 2: groups 1 and 0, at 4/7 and 3/7. Inside group 0, 5 and 2 of 1,
# 2, 5 share 5/7 and 2/7; inside group 1, 6, 3, 1 with noise 0, 0, 3 are 6, 3, 8: 8/14 and 6/14.
HIERARCHICAL = (
    Case(
        "groups 3, 1, 2 with noise 0, 2, 0: the best two of each of the best two",
        (powers(1, 2, 5, 6, 3, 1, 40, 50, 60),),
        4,
        ({5: 4 / 7 * 8 / 14, 2: 3 / 7 * 5 / 7, 3: 4 / 7 * 6 / 14, 1: 3 / 7 * 2 / 7},),
        {
            "noise": _rows(0, 0, 0, 0, 0, 3, 0, 0, 0),
            "noise_logits": ((0.0,) * 9,),
            "primary": (powers(3, 1, 2),),
            "primary_noise": _rows(0, 2, 0),
            "primary_noise_logits": _rows(0, 0, 0),
            "num_primary": 2,
        },
        # Of the other groups the second highest is 2 to groups 0 and 1; one token chose each of those.
        sums={
            "importance": (0.0, 6 / 49, 15 / 49, 12 / 49, 0.0, 16 / 49, 0.0, 0.0, 0.0),
            "load": (
                *(below(3, 2) * chance for chance in (below(1, 2), below(2, 1), below(5, 1))),
                *(below(1, 2) * chance for chance in (below(6, 3), below(3, 6), below(1, 3))),
                *(0.0, 0.0, 0.0),
            ),
        },
    ),
)

_FIVE = (powers(5, 3, 1, 1),)
ST_MOE = (
    # g = 5/8, 3/8: the second is used below 3/8 / 0.5 = 0.75. By its raw score, 0.3 / 0.5, 0.7 would fail.
    Case(
        "5, 3, 1, 1, coin 0.7 below 0.375 / 0.5: both",
        _FIVE,
        2,
        ({0: 5 / 8, 1: 3 / 8},),
        {"later_coins": _rows(0.7), "threshold": 0.5},
    ),
    Case(
        "5, 3, 1, 1, coin 0.8 above it: the first keeps its share",
        _FIVE,
        2,
        ({0: 5 / 8},),
        {"later_coins": _rows(0.8), "threshold": 0.5},
    ),
    Case(
        "5, 3, 1, 1, coin 0.99 and threshold 0.2: at most 1 is at least 0.375",
        _FIVE,
        2,
        ({0: 5 / 8, 1: 3 / 8},),
        {"later_coins": _rows(0.99), "threshold": 0.2},
    ),
    # Chances 0.3 / 0.4 and 0.2 / 0.4.
    Case(
        "5, 3, 2 at threshold 0.4, coins 0.8 and 0.4: the third without the second",
        (powers(5, 3, 2),),
        3,
        ({0: 0.5, 2: 0.2},),
        {"later_coins": _rows(0.8, 0.4), "threshold": 0.4},
    ),
)
REMOE = (
    # f = E / (K T) tokens = 2, 0, 1, 0; (2 x 1 + 1 x 2 + 2 x 3) / 2 tokens = 5, times 0.3 is 1.5.
    # 5 of 8 are zeros, more than 1 - 2/4: lambda falls to 0.3 / 1.2.
    Case(
        "1, -1, 2, -3 and 3, 0, -1, -1: what is above 0, and fewer than K on average",
        ((1.0, -1.0, 2.0, -3.0), (3.0, 0.0, -1.0, -1.0)),
        2,
        ({2: 2.0, 0: 1.0}, {0: 3.0}),
        {"penalty": 0.3, "alpha": 1.2},
        sums={"penalty_loss": (1.5,), "next_penalty": (0.25,)},
    ),
    # f = 3 / 1 each: (3 x 1 + 3 x 2) = 9, times 0.5; 1 of 3 zeros, fewer than 1 - 1/3: lambda rises.
    Case(
        "1, 2, -1 with K = 1: more than K are used",
        ((1.0, 2.0, -1.0),),
        1,
        ({1: 2.0, 0: 1.0},),
        {"penalty": 0.5, "alpha": 2.0},
        sums={"penalty_loss": (4.5,), "next_penalty": (1.0,)},
    ),
    Case(
        "1, -1 with K = 1: as many as wanted, lambda stays",
        ((1.0, -1.0),),
        1,
        ({0: 1.0},),
        {"penalty": 0.5, "alpha": 2.0},
        sums={"penalty_loss": (1.0,), "next_penalty": (0.5,)},
    ),
    Case("no logit above 0: no expert", ((-1.0, -2.0),), 1, ({},), {"penalty": 0.5, "alpha": 2.0}),
)

_DEAF = "the noise is not used"
_TAKEN = ("noise", "noise_logits")
_PRIMARY = ("primary", "primary_noise", "primary_noise_logits", "num_primary")

NOISY: dict[str, Rule] = {
    "noisy_top_k": Rule(
        "K best of logits + noise * softplus(noise_logits), softmax over those (2017 eq 3-5)",
        NOISY_TOP_K,
        NoisyTopK(),
        _TAKEN,
        {
            _DEAF: NoisyTopK(deaf=True),
            "the noise is times noise_logits, without softplus": NoisyTopK(bare_spread=True),
            "weights come from logits without noise": NoisyTopK(clean_weights=True),
            "weights are a softmax over all experts; the rule's runs over the chosen": NoisyTopK(
                full_softmax=True
            ),
        },
        least=2,
        sums=NoisySums(),
        wrong_sums={
            "importance sums the softmax over all experts, not the sparse gates": NoisySums(dense=True),
            "load compares with the K-th highest of all, not of the others": NoisySums(own=True),
            "load starts from noisy logits, not from clean ones": NoisySums(noisy_clean=True),
            "load counts tokens: it is no smooth estimate, and teaches nothing": NoisySums(counted=True),
        },
    ),
    "hierarchical": Rule(
        "noisy_top_k among groups (`primary`), then inside each chosen one; weights multiply (2017 eq 12)",
        HIERARCHICAL,
        TwoLevels(),
        (*_TAKEN, *_PRIMARY),
        {
            "the K best products of all experts are taken, not the best of the best groups": TwoLevels(
                flat=True
            ),
            "the groups' weights are not used": TwoLevels(no_primary_weight=True),
            "the groups are chosen without noise": TwoLevels(deaf_primary=True),
        },
        shapes=((6, 12), (2, 24), (0, 8)),
        least=4,
        sums=TwoLevelSums(),
        wrong_sums={
            "load is that of the second level alone (eq 14 has the first one's too)": TwoLevelSums(
                secondary_alone=True
            )
        },
    ),
    "st_moe": Rule(
        "softmax, K best, renormalised; choice i > 1 if later_coins < g_i / threshold (ST-MoE appendix G)",
        ST_MOE,
        Coined(),
        ("later_coins", "threshold"),
        {
            "coins are held to raw scores, not to shares": Coined(raw_coin=True),
            "no coin is used: every choice is": Coined(sure=True),
            "no coin is used: a choice is if its share reaches the threshold": Coined(cut=True),
            "weights are raw scores; the rule renormalises them": Coined(raw=True),
            "shares are taken after choices are left out; the rule takes them before": Coined(after=True),
        },
        least=2,
        open_places=True,
    ),
    "remoe": Rule(
        "every expert with a logit above 0, at the logit (ReMoE); penalty by eq 7-8 and 10-11",
        REMOE,
        Positive(),
        ("penalty", "alpha"),
        {
            "weights are renormalised over the chosen; the rule keeps the logits": Positive(shares=True),
            "at most K experts are used; the rule uses every one above 0": Positive(limited=True),
        },
        open_places=True,
        shift=1 / 32,
        sums=Penalty(),
        wrong_sums={
            "f lacks the factor 1 / K": Penalty(factor="E"),
            "f lacks the factor E / K": Penalty(factor="1"),
            "the penalty is the plain L1 norm: f is not used": Penalty(unweighed=True),
            "the penalty moves the wrong way": Penalty(turned=True),
        },
    ),
}
