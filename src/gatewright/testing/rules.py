"""The routers that can be checked: what each takes and returns, its cases, its definition, known mistakes."""

from __future__ import annotations

from dataclasses import replace

from gatewright.testing import cases
from gatewright.testing.noisy_rules import NOISY
from gatewright.testing.rule import Rule
from gatewright.testing.slow_routers import (
    Choice,
    Slow,
    TwoExperts,
    base,
    expert_choice,
    expert_choice_over_tokens,
    hashed,
    hashed_and_weighed,
    sinkhorn,
    top_p,
)

_GROUPED = ((6, 8), (2, 32), (1, 4), (0, 8))

_SOFT = Choice()
_MIXED = Choice(weights="softmax_selected")
_V2, _V3 = Choice(), Choice("sigmoid", "renormalised", group_score="top2")
_FREE, _V4 = Choice("sigmoid"), Choice("sqrt_softplus", "renormalised")
_TIES = "among equal scores the highest id is taken, not the lowest"
_RENORMALISED = "weights are renormalised over the chosen; the rule keeps raw scores"
_KEPT_RAW = "weights are raw scores; the rule renormalises them over the chosen"
_BIASED = "weights come from biased scores; the bias is for selection only"
_DEAF = "the bias is not used"
_SCALE = "the scale is not applied"


def _of_groups(slow: Choice) -> dict[str, Slow]:
    other = "max" if slow.group_score == "top2" else "top2"
    told = (
        "their best expert, not by the sum of the two best" if other == "max" else "their two best, not one"
    )
    return {
        "losing groups are set to 0, not -inf: they win where biased scores are negative": replace(
            slow, losing=0.0
        ),
        f"groups are ranked by {told}": replace(slow, group_score=other),
        "there is no group limit": replace(slow, deaf_to="num_groups groups_kept"),
        _SCALE: replace(slow, deaf_to="scale"),
        _TIES: replace(slow, highest_id=True),
    }


def _of_bias(slow: Choice) -> dict[str, Slow]:
    return {_BIASED: replace(slow, biased_weights=True), _DEAF: replace(slow, deaf_to="bias")}


_SWITCH = Rule(
    "softmax; the best expert at its raw score (Switch eq 1-2)",
    cases.SWITCH,
    _SOFT,
    mistakes={_TIES: replace(_SOFT, highest_id=True), "sigmoid, not softmax": Choice("sigmoid")},
    most=1,
)
_RAW = Rule(
    "softmax; K best experts at their raw scores (OLMoE eq 1)",
    cases.RAW,
    _SOFT,
    mistakes={
        _RENORMALISED: _MIXED,
        _TIES: replace(_SOFT, highest_id=True),
        "sigmoid, not softmax": Choice("sigmoid"),
    },
)
_SELECTED = Rule(
    "K best experts, softmax over their logits (Mixtral section 2.1)",
    cases.SELECTED,
    _MIXED,
    mistakes={_KEPT_RAW: _SOFT, _TIES: replace(_MIXED, highest_id=True)},
    least=2,
)

RULES: dict[str, Rule] = {
    "switch": _SWITCH,
    "olmoe": _RAW,
    "token_choice_raw": _RAW,
    "deepseek_moe": _RAW,
    "mixtral": _SELECTED,
    "qwen3": _SELECTED,
    "token_choice": _SELECTED,
    "gpt_oss": Rule(
        "K best logits (bias included), softmax over them (released code of gpt-oss)",
        cases.GPT_OSS,
        Choice(weights="softmax_selected", by="logits"),
        mistakes={
            "chosen by softmax scores, which tie where they underflow; the rule takes logits": _MIXED,
            _TIES: Choice(weights="softmax_selected", by="logits", highest_id=True),
        },
        least=2,
    ),
    "llama4": Rule(
        "K best logits at their sigmoid, raw; it weighs the expert's input (released code of Llama-4)",
        cases.LLAMA4,
        Choice("sigmoid", by="logits"),
        mistakes={
            "chosen by sigmoid scores, which tie where they round to 1; the rule takes logits": _FREE,
            _RENORMALISED: Choice("sigmoid", "renormalised", by="logits"),
            "softmax, not sigmoid": Choice(by="logits"),
            _TIES: Choice("sigmoid", by="logits", highest_id=True),
        },
    ),
    "loss_free": Rule(
        "sigmoid; K best of score + bias, at raw unbiased scores (Loss-Free Balancing eq 3)",
        cases.LOSS_FREE,
        _FREE,
        ("bias",),
        {**_of_bias(_FREE), _RENORMALISED: replace(_FREE, weights="renormalised")},
    ),
    "deepseek_v2": Rule(
        "softmax; K best in the best groups (by their best expert), raw scores times scale (section 2.2)",
        cases.DEEPSEEK_V2,
        _V2,
        ("num_groups", "groups_kept", "scale"),
        {**_of_groups(_V2), _RENORMALISED: replace(_V2, weights="renormalised")},
        _GROUPED,
    ),
    "deepseek_v3": Rule(
        "sigmoid; K best of score + bias in the best groups (by their two best), unbiased scores "
        "renormalised, times scale (eq 12-16)",
        cases.DEEPSEEK_V3,
        _V3,
        ("bias", "num_groups", "groups_kept", "scale"),
        {**_of_groups(_V3), **_of_bias(_V3), _KEPT_RAW: replace(_V3, weights="raw")},
        _GROUPED,
        least=2,
    ),
    "deepseek_v4": Rule(
        "sqrt(softplus); K best of score + bias, unbiased scores renormalised, times scale (released code)",
        cases.DEEPSEEK_V4,
        _V4,
        ("bias", "scale"),
        {
            **_of_bias(_V4),
            _SCALE: replace(_V4, deaf_to="scale"),
            _KEPT_RAW: replace(_V4, weights="raw"),
            "sigmoid, not sqrt(softplus)": replace(_V4, scores="sigmoid"),
        },
        least=2,
    ),
    "deepseek_v4_hash": Rule(
        "experts from a table of token ids, at renormalised sqrt(softplus), times scale (released code)",
        cases.DEEPSEEK_V4_HASH,
        hashed_and_weighed,
        ("table", "token_ids", "scale"),
        least=2,
    ),
    "hash": Rule(
        "experts from a table of token ids, at 1 / K (Hash Layers eq 3)",
        cases.HASH,
        hashed,
        ("table", "token_ids"),
        learns=False,
    ),
    "gshard": Rule(
        "the best expert, the second if 2 g2 > its coin; g1 + g2 = 1 before any drop; first choices are "
        "seated first in `capacity` places (algorithm 1)",
        cases.GSHARD,
        TwoExperts(),
        ("coins", "capacity"),
        {
            "the second's coin is held to twice its raw score, not to twice its share": TwoExperts(
                raw_coin=True
            ),
            "the second's weight and coin use its raw score, the first's weight its share": TwoExperts(
                raw_coin=True, raw_second=True
            ),
            "shares are taken after drops; the rule takes them before": TwoExperts(after_drop=True),
            "shares are taken after drops, and the second's coin is held to its raw score": TwoExperts(
                raw_coin=True, after_drop=True
            ),
            "a token's second choice is seated before later tokens' first": TwoExperts(by_token=True),
        },
        least=2,
        most=2,
        open_places=True,
    ),
    "top_p": Rule(
        "softmax; best experts until their scores sum to p, at most K, raw scores (Huang et al. section 3)",
        cases.TOP_P,
        top_p,
        ("p",),
        open_places=True,
    ),
    "expert_choice": Rule(
        "softmax; each expert its ceil(K T / E) best tokens at raw scores (Expert Choice eq 1-2)",
        cases.EXPERT_CHOICE,
        expert_choice,
        mistakes={"the softmax runs over tokens, not over experts": expert_choice_over_tokens},
        most=4,
        by_expert=True,
    ),
    "sinkhorn": Rule(
        "in training, K best of a plan with even rows and columns, at raw scores: sigmoid for K = 1, else "
        "softmax (S-BASE)",
        cases.SINKHORN,
        sinkhorn,
        mistakes={"the choice is the best scores: nothing is balanced": Choice("sigmoid")},
        shapes=((6, 3), (5, 4)),
        most=2,
        noise=0.02,
    ),
    "base": Rule(
        "in training, one expert each, equal loads, the greatest sum of logits, at sigmoid scores (BASE)",
        cases.BASE,
        base,
        mistakes={"the choice is the best scores: nothing is balanced": Choice("sigmoid")},
        shapes=((6, 3), (5, 2), (4, 4), (2, 3)),
        most=1,
    ),
    **NOISY,
}
