"""GShard: top-2 with a coin for the second expert, first choices before second ones."""

from __future__ import annotations

from typing import Any

import torch

from gatewright.parts.capacity import Capacity
from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.threshold_second import ThresholdSecond


class GShard(ThresholdSecond):
    """Each token takes its best expert, and its second best with probability 2 g2.

    Equation: GShard algorithm 1. g1, g2 = the two largest softmax scores over their sum, taken before any
    drop; the second is used if 2 g2 > u, u uniform on [0, 1) per token. First choices of all tokens of a
    routing group of S are seated before any second one, in position order, in C = 2 S / E places (here
    rounded up). A token keeps g1 < 1 where its second choice is not used, and 0 where neither has room.
    Args: `coin` "train" flips it in training only, "always" in evaluation too (the paper makes no
    difference), "never" uses every second choice. `counters`: see Differs.
    Differs: as printed, the algorithm advances the second expert's counter for a token that its coin rejects
    too: `counters` "literal". The authors' code leaves such a place to others: "compact", the default.
    """

    def __init__(self, coin: str = "train", counters: str = "compact") -> None:
        # A second share is at most 1 / 2, so that g2 / 0.5 = 2 g2 is a probability.
        super().__init__(2, 0.5, "random", coin, counters)


def _make(
    width: int, num_experts: int, num_selected: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    check_selection(num_experts, num_selected, "renormalised")
    rule = GShard(**options)
    return Router(width, num_experts, dtype, rule=rule, capacity=Capacity(1.0, order="rank"))


register(
    RouterInfo(
        name="gshard",
        scores="softmax",
        selection="the best expert; the second with probability 2 g2",
        weights="renormalised over the two, before any drop",
        capacity="C = 2 S / E per routing group, first choices first",
        losses=("gshard",),
        causal=False,
        used_by="GShard",
        source="GShard algorithm 1",
        make=_make,
        fixed_selected=2,
    )
)
