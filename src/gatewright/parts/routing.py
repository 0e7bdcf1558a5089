"""Who goes where: what a selection rule is given, what it returns, and choosing the highest scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import TopK, rank_rows, ranks_fast
from gatewright.kernels.native import route as native_route

WeightForm = Literal["raw", "renormalised", "softmax_selected"]
WEIGHT_FORMS: tuple[WeightForm, ...] = ("raw", "renormalised", "softmax_selected")

WeightSide = Literal["output", "input"]

# Above this many choices, ranking rows costs less than one argmax pass per choice.
_ARGMAX_PASSES, _FAST_PASSES = 16, 3

# Up to one choice in this many pairs of token and expert, sorting the choices beats sorting every row.
_SPARSE = 16


@dataclass(frozen=True)
class RoutingCall:
    """What a rule may know about one call beside its T tokens' logits and scores.

    `mask` [T] bool, False = padding. `training` switches noise, coins and balanced assignment on. `key` 0-d
    int64: every draw is a pure function of it (parts.draws), so that recomputation repeats it. `token_ids`
    [T] int64, for rules that look at the input. `group_size`: tokens per routing group, in flat order (the
    last group may be smaller); None is one group. Rules that count do so inside a group only, so their
    result does not depend on how whole groups are split over calls. `stats_size`: the same for the groups
    that Stats tell apart, which no rule looks at.
    """

    mask: Bool[Tensor, "T"] | None = None
    training: bool = False
    key: Int64[Tensor, ""] | None = None
    token_ids: Int64[Tensor, "T"] | None = None
    group_size: int | None = None
    stats_size: int | None = None


@dataclass(frozen=True)
class Assignment:
    """Who goes where: `experts` [T, K] int64 in falling rank (-1 = empty place), `weights` [T, K] with
    gradient, E experts.

    Rules with a varying number of experts per token have K places, as many as any token needs, and leave the
    rest empty. `weight_side`: "output" weighs what an expert returns, "input" what it is given (Llama-4).
    `withdrawn` [T, K] bool: choices that take a place in the count against capacity but are not computed
    (GShard's literal counters); their expert is named in `experts`. `sums`: what the rule itself has to say
    to a loss, summed over tokens, by name, with gradient; ends in RouterStats.sums.
    """

    experts: Int64[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    num_experts: int
    weight_side: WeightSide = "output"
    withdrawn: Bool[Tensor, "T K"] | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.experts.shape[0]

    @property
    def num_selected(self) -> int:
        """K, the places per token."""
        return self.experts.shape[1]


# Turns logits [T, E] and scores [T, E] into an Assignment: a function, or an nn.Module where it holds state.
SelectionRule = Callable[[Tensor, Tensor, RoutingCall], Assignment]


def top_k_of(rule: Any) -> TopK | None:
    """Return the rule as a plain choice of the K best, None where it is more than that or does not say."""
    describe = getattr(rule, "as_top_k", None)
    return None if describe is None else describe()


def select_top(scores: Float[Tensor, "T E"], num_selected: int) -> Int64[Tensor, "T K"]:
    """Return the ids [T, K] of the K highest scores [T, E], highest first; among equals the lowest expert id
    first.

    torch.topk breaks ties arbitrarily, so it is not used. A NaN counts as the highest score, as in
    torch.sort. Carries no gradient.
    """
    scores = scores.detach()
    chosen = native_route.select_top(scores, num_selected)
    if chosen is not None:
        return chosen
    num_experts = scores.shape[-1]
    # Passes mark what they took with -inf, so a row without K other scores is ranked. Compiled code ranks
    # always: it may not look at the numbers.
    most = _FAST_PASSES if ranks_fast(scores) else _ARGMAX_PASSES
    if num_selected > most or num_selected == num_experts or torch.compiler.is_compiling():
        passes = False
    else:
        passes = bool((torch.isneginf(scores).sum(dim=-1) <= num_experts - num_selected).all())
    if not passes:
        # A copy: the slice alone would keep all E ids alive until the backward pass.
        return rank_rows(scores)[:, :num_selected].contiguous()
    left = scores.clone()
    picks = []
    for _ in range(num_selected):
        best = torch.argmax(left, dim=-1, keepdim=True)
        picks.append(best)
        left.scatter_(-1, best, -torch.inf)
    return torch.cat(picks, dim=-1)


def check_selection(num_experts: int, num_selected: int, weights: str) -> None:
    """Raise UserError unless 1 <= K <= E and the weight form can train a router."""
    if num_experts < 1:
        raise UserError(
            f"num_experts {num_experts}; allowed: 1 or more; give the number of experts per layer"
        )
    if not 1 <= num_selected <= num_experts:
        raise UserError(
            f"num_selected {num_selected} with num_experts {num_experts}; allowed: 1 to {num_experts}; "
            "select at most as many experts as there are"
        )
    if weights not in WEIGHT_FORMS:
        raise UserError(
            f"weights {weights!r} is unknown{did_you_mean(weights, WEIGHT_FORMS)}; allowed: "
            f"{', '.join(WEIGHT_FORMS)}"
        )
    if num_selected == 1 and num_experts > 1 and weights != "raw":
        raise UserError(
            f"num_selected 1 with weights {weights!r} makes every gate exactly 1, so the router gets no "
            "gradient; "
            "use weights 'raw', or select 2 or more experts"
        )


def from_mask(
    chosen: Bool[Tensor, "T E"], weights: Float[Tensor, "T E"], places: int | None = None
) -> Assignment:
    """Return the assignment in which token t uses every expert e with chosen[t, e], in falling order of
    weight (the lowest id first among equals).

    Args: `weights` [T, E]; `places` K, None counts as many as the busiest token needs (compiled code takes
    E, since it may not look at the numbers). Places beyond a token's own experts are empty, with weight 0.
    """
    num_tokens, num_experts = chosen.shape
    if torch.compiler.is_compiling():
        few, places = False, num_experts if places is None else places
    else:
        # int32: summing booleans in int64 costs nine times as much.
        held = chosen.sum(dim=1, dtype=torch.int32)
        few = int(held.sum()) * _SPARSE <= num_tokens * num_experts
        places = (int(held.max()) if num_tokens else 0) if places is None else places
    # Few choices are sorted by themselves; where there are many, whole rows cost less.
    if few:
        experts = _ranked_choices(chosen, weights.detach(), held, max(places, 1))
        taken = experts >= 0
        weights = weights.gather(1, experts.clamp(min=0))
    else:
        experts = select_top(torch.where(chosen, weights.detach(), -torch.inf), max(places, 1))
        taken = chosen.gather(1, experts)
        weights, experts = weights.gather(1, experts), torch.where(taken, experts, -1)
    return Assignment(experts, torch.where(taken, weights, 0), num_experts)


def _ranked_choices(
    chosen: Bool[Tensor, "T E"], weights: Float[Tensor, "T E"], held: Int[Tensor, "T"], places: int
) -> Int64[Tensor, "T K"]:
    """Return each token's experts [T, K] in falling order of weight, -1 where it has no more; `held` [T] is
    how many it has.
    """
    num_tokens, num_experts = chosen.shape
    flat = chosen.flatten().nonzero().squeeze(1)
    tokens = flat.div(num_experts, rounding_mode="floor")
    ranks = torch.arange(flat.shape[0], device=flat.device) - (held.cumsum(0) - held)[tokens]
    # Each token's choices side by side in the order of their ids, so that equals stay in it.
    width = max(int(held.max()) if num_tokens else 0, places)
    own = weights.new_full((num_tokens, width), -torch.inf)
    experts = torch.full((num_tokens, width), -1, dtype=torch.int64, device=flat.device)
    own[tokens, ranks] = weights.flatten()[flat]
    experts[tokens, ranks] = flat - tokens * num_experts
    return experts.gather(1, rank_rows(own)[:, :places])
