"""Routers' cases worked by hand: logits whose scores are round numbers, and the weights that come of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """A few tokens: the logits of each, K, and per token {expert: weight}; `tie`: equal scores decide;
    `sums`: what the rule says to a loss, by name.
    """

    name: str
    rows: tuple[Row, ...]
    num_selected: int
    expected: tuple[dict[int, float], ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tie: bool = False
    sums: Mapping[str, Row] = field(default_factory=dict)


def powers(*values: float) -> Row:
    """Return logits whose softmax is the values over their sum."""
    return tuple(math.log(value) for value in values)


def odds(*scores: float) -> Row:
    """Return logits whose sigmoids are these scores."""
    return tuple(math.log(score / (1 - score)) for score in scores)


def roots(*scores: float) -> Row:
    """Return logits whose sqrt(softplus) are these scores."""
    return tuple(math.log(math.expm1(score**2)) for score in scores)


def one(
    name: str, row: Row, num_selected: int, expected: dict[int, float], tie: bool = False, **options: Any
) -> Case:
    """Return the case of a single token."""
    return Case(name, (row,), num_selected, (expected,), options, tie)


_EQUAL = powers(1, 1, 1, 1)
_LAST = powers(2, 1, 4, 2)

RAW = (
    one("top 1 of 2, 5, 1, 2 (sum 10)", powers(2, 5, 1, 2), 1, {1: 5 / 10}),
    one("top 2 of 3, 1, 5, 2 (sum 11)", powers(3, 1, 5, 2), 2, {2: 5 / 11, 0: 3 / 11}),
    one("all of 2, 5, 1 (sum 8)", powers(2, 5, 1), 3, {1: 5 / 8, 0: 2 / 8, 2: 1 / 8}),
    one("a single expert", powers(7), 1, {0: 1.0}),
    one("four equal scores: the lowest ids", _EQUAL, 2, {0: 1 / 4, 1: 1 / 4}, tie=True),
    one("a tie for the last place: the lowest id", _LAST, 2, {2: 4 / 9, 0: 2 / 9}, tie=True),
)
SWITCH = (
    *(case for case in RAW if case.num_selected == 1),
    one("four equal scores: the lowest id", _EQUAL, 1, {0: 1 / 4}, tie=True),
)
SELECTED = (
    one("top 2 of 3, 1, 5, 2: 5 and 3 share 1", powers(3, 1, 5, 2), 2, {2: 5 / 8, 0: 3 / 8}),
    one("top 3 of 1, 2, 3, 4", powers(1, 2, 3, 4), 3, {3: 4 / 9, 2: 3 / 9, 1: 2 / 9}),
    one("all of 2, 5, 1", powers(2, 5, 1), 3, {1: 5 / 8, 0: 2 / 8, 2: 1 / 8}),
    one("four equal scores: the lowest ids", _EQUAL, 2, {0: 1 / 2, 1: 1 / 2}, tie=True),
    one("a tie for the last place: the lowest id", _LAST, 2, {2: 4 / 6, 0: 2 / 6}, tie=True),
)
# Behind 1000, a softmax over all experts is 0 for both others, and would tie them.
GPT_OSS = (*SELECTED, one("logits 0, 1, 1000: chosen by logit", (0.0, 1.0, 1000.0), 2, {2: 1.0, 1: 0.0}))

LLAMA4 = (
    one("sigmoids 0.2, 0.9, 0.5: top 1", odds(0.2, 0.9, 0.5), 1, {1: 0.9}),
    one("sigmoids 0.2, 0.9, 0.5: top 2, not renormalised", odds(0.2, 0.9, 0.5), 2, {1: 0.9, 2: 0.5}),
    # Both sigmoids round to 1: chosen by score, the tie would go to expert 0.
    one("logits 40, 41: chosen by logit", (40.0, 41.0), 1, {1: 1.0}),
    one("equal logits: the lowest id", (0.0, 0.0, 0.0), 1, {0: 0.5}, tie=True),
)

# Groups of two. 5 + 1 < 4 + 3, but 5 > 4: by its best expert the first group wins.
_GROUPS: dict[str, Any] = {"num_groups": 2, "groups_kept": 1}
DEEPSEEK_V2 = (
    one(
        "5, 1 | 4, 3 (sum 13): groups by their best", powers(5, 1, 4, 3), 2, {0: 5 / 13, 1: 1 / 13}, **_GROUPS
    ),
    one(
        "the best expert of a losing group is out",
        powers(6, 1, 1, 5, 4, 4),
        2,
        {0: 6 / 21, 1: 1 / 21},
        num_groups=3,
        groups_kept=1,
    ),
    one(
        "3, 1, 5, 2 (sum 11), times 16: not renormalised",
        powers(3, 1, 5, 2),
        2,
        {2: 80 / 11, 0: 48 / 11},
        scale=16.0,
    ),
    one(
        "4, 2 | 2, 4: of equal groups the lowest",
        powers(4, 2, 2, 4),
        2,
        {0: 4 / 12, 1: 2 / 12},
        tie=True,
        **_GROUPS,
    ),
)

DEEPSEEK_V3 = (
    # Biased 0.3, 0.6, 0.7, 0.2: experts 2 and 1, weighed 0.4 and 0.6. Biased weights would be 7/13, 6/13.
    one(
        "0.8, 0.6, 0.4, 0.2 with bias -0.5, 0, 0.3, 0: weights of unbiased scores",
        odds(0.8, 0.6, 0.4, 0.2),
        2,
        {2: 0.4, 1: 0.6},
        bias=(-0.5, 0.0, 0.3, 0.0),
    ),
    one(
        "0.8, 0.6, 0.4, 0.2: 8 and 6 share 2.5",
        odds(0.8, 0.6, 0.4, 0.2),
        2,
        {0: 2.5 * 8 / 14, 1: 2.5 * 6 / 14},
        scale=2.5,
    ),
    # 1.0 < 1.1, although 0.9 is the best expert of all.
    one(
        "0.9, 0.1 | 0.6, 0.5: groups by their two best",
        odds(0.9, 0.1, 0.6, 0.5),
        2,
        {2: 6 / 11, 3: 5 / 11},
        **_GROUPS,
    ),
    # Biased -0.5, -0.6 | -0.7, -0.8: the first group wins. A losing group set to 0 would beat it.
    one(
        "0.5, 0.4 | 0.3, 0.2 with bias -1: losing groups stay out below 0",
        odds(0.5, 0.4, 0.3, 0.2),
        2,
        {0: 5 / 9, 1: 4 / 9},
        bias=(-1.0, -1.0, -1.0, -1.0),
        **_GROUPS,
    ),
    # e^-30 and e^-31 share 1; (biased - bias) would have lost both in 12.
    one(
        "scores near 1e-13 under a bias of 12",
        (-30.0, -31.0, -40.0, -40.0),
        2,
        {0: math.e / (math.e + 1), 1: 1 / (math.e + 1)},
        bias=(12.0, 12.0, 0.0, 0.0),
    ),
    one("four equal scores: the lowest ids", odds(0.5, 0.5, 0.5, 0.5), 2, {0: 0.5, 1: 0.5}, tie=True),
    one(
        "0.4, 0.6 | 0.4, 0.6: of equal groups the lowest",
        odds(0.4, 0.6, 0.4, 0.6),
        2,
        {1: 0.6, 0: 0.4},
        tie=True,
        **_GROUPS,
    ),
)
LOSS_FREE = (
    one(
        "0.8, 0.6, 0.3, 0.2 with bias -0.5, 0, 0.4, 0: raw, unbiased weights",
        odds(0.8, 0.6, 0.3, 0.2),
        2,
        {2: 0.3, 1: 0.6},
        bias=(-0.5, 0.0, 0.4, 0.0),
    ),
    one("0.8, 0.6 without bias: top 1", odds(0.8, 0.6), 1, {0: 0.8}),
)
DEEPSEEK_V4 = (
    # Biased 1.0, 1.3, 0.5, 1.5: experts 3 and 1; 1.5 and 0.5 share 1.5.
    one(
        "1, 0.5, 2, 1.5 with bias 0, 0.8, -1.5, 0, times 1.5",
        roots(1, 0.5, 2, 1.5),
        2,
        {3: 1.125, 1: 0.375},
        bias=(0.0, 0.8, -1.5, 0.0),
        scale=1.5,
    ),
    one("1, 0.5, 2, 1.5: 2 and 1.5 share 1", roots(1, 0.5, 2, 1.5), 2, {2: 4 / 7, 3: 3 / 7}),
)

_PAIR = powers(5, 3, 1, 1)
GSHARD = (
    # g = 5/8, 3/8: the second is used below 2 g2 = 0.75. Against 2 * 0.3, its raw score, 0.7 would fail.
    one("5, 3, 1, 1, coin 0.7 < 2 g2: both", _PAIR, 2, {0: 5 / 8, 1: 3 / 8}, coins=(0.7,)),
    one("5, 3, 1, 1, coin 0.8 > 2 g2: the first keeps its share", _PAIR, 2, {0: 5 / 8}, coins=(0.8,)),
    # Two places. First choices 0, 0, 1 are seated; then token 0's second fits on 1, and no other does.
    Case(
        "two places: first choices before second, shares kept after drops",
        (_PAIR, _PAIR, powers(3, 5, 1, 1)),
        2,
        ({0: 5 / 8, 1: 3 / 8}, {0: 5 / 8}, {1: 5 / 8}),
        {"coins": (0.0, 0.0, 0.0), "capacity": 2},
    ),
)
_SURE = powers(5, 3, 2)
TOP_P = (
    one("0.5, 0.3, 0.2 until 0.45", _SURE, 3, {0: 0.5}, p=0.45),
    one("0.5, 0.3, 0.2 until 0.6", _SURE, 3, {0: 0.5, 1: 0.3}, p=0.6),
    one("0.5, 0.3, 0.2 until 0.95", _SURE, 3, {0: 0.5, 1: 0.3, 2: 0.2}, p=0.95),
    one("0.5, 0.3, 0.2 until 0.95, at most 2", _SURE, 2, {0: 0.5, 1: 0.3}, p=0.95),
)
EXPERT_CHOICE = (
    # Expert 0 sees 0.75, 0.25, 0.6, 0.5 and takes tokens 0, 2; expert 1 the complements, and takes 1, 3.
    Case(
        "4 tokens, 2 experts, 2 places each",
        (powers(3, 1), powers(1, 3), powers(3, 2), powers(1, 1)),
        1,
        ({0: 0.75}, {1: 0.75}, {0: 0.6}, {1: 0.5}),
    ),
    # Token 0 is the best of experts 0 and 1, token 1 of expert 2, token 2 of none.
    Case(
        "3 tokens, 3 experts, 1 place each: one token twice, one not at all",
        (powers(4, 4, 1), powers(1, 1, 2), powers(1, 1, 1)),
        1,
        ({0: 4 / 9, 1: 4 / 9}, {2: 2 / 4}, {}),
    ),
)
SINKHORN = (
    # Both prefer expert 0. In the plan p^2 / (1 - p)^2 = 8 / 2, p = 2/3: token 1 goes to expert 1.
    Case(
        "powers 8, 1 and 2, 1: the plan parts what scores would not",
        (powers(8, 1), powers(2, 1)),
        1,
        ({0: 8 / 9}, {1: 1 / 2}),
    ),
)
BASE = (
    # Both prefer expert 0; 2 + 3 is more than 3 + 1.
    Case(
        "logits 3, 2 and 3, 1: the better sum wins",
        ((3.0, 2.0), (3.0, 1.0)),
        1,
        ({1: 1 / (1 + math.exp(-2))}, {0: 1 / (1 + math.exp(-3))}),
    ),
)
_TABLE = {"table": ((0, 2), (1, 0), (3, 1))}
HASH = (
    Case(
        "ids 2, 0 of a table: 1 / K each, whatever the logits",
        (powers(1, 2, 3, 4), powers(9, 1, 1, 1)),
        2,
        ({3: 0.5, 1: 0.5}, {0: 0.5, 2: 0.5}),
        {**_TABLE, "token_ids": (2, 0)},
    ),
)
DEEPSEEK_V4_HASH = (
    # Experts 3 and 1: 1.5 and 0.5 share 1.5.
    Case(
        "id 2 of a table, times 1.5: learned scores share",
        (roots(1, 0.5, 2, 1.5),),
        2,
        ({3: 1.125, 1: 0.375},),
        {**_TABLE, "token_ids": (2,), "scale": 1.5},
    ),
)
