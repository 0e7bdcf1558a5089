"""Second choices that are used only sometimes: ST-MoE's top-n routing, of which GShard's coin is a case."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.capacity import Capacity
from gatewright.parts.draws import call_key, fold, uniform
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.rules.registry import RouterInfo, register

POLICIES = ("random", "threshold", "all")
COINS = ("train", "always", "never")
COUNTERS = ("compact", "literal")

# Apart from the draws of a noise that has the same key.
_COIN_STREAM = 2202_08906


def later_choice_coins(
    call: RoutingCall, num_tokens: int, num_later: int, device: torch.device
) -> Float[Tensor, "T N"]:
    """Return the coin numbers of one call, uniform on [0, 1), one per token and later choice, [T, N] fp32."""
    return uniform(fold(call_key(call, device), _COIN_STREAM), (num_tokens, num_later), device)


class ThresholdSecond:
    """Each token takes its n best experts, the first always and choice i > 1 as `policy` says.

    Equation: ST-MoE appendix G: g = the n largest softmax scores over their sum; choice i > 1 is used with
    probability min(1, g_i / threshold). Weights are g itself: what a token loses is not made up for.
    Args: `num_selected` n; `threshold` in (0, 1]; `policy` "random" as above, "threshold" uses choice i if
    g_i >= threshold, "all" uses every choice. `coin` says when "random" flips its coin: "train", in training
    only (evaluation then uses all n), "always" or "never". `counters` "compact": a choice that is not used
    takes no place; "literal": it takes one in its expert's capacity and leaves it empty (GShard algorithm 1).
    Raises: UserError for unknown words, a threshold outside (0, 1], and n = 1 < E (a constant gate).
    Differs: appendix G does not say whether the coin is flipped in evaluation; the released code of ST-MoE
    has no coin and does not renormalise.
    """

    def __init__(
        self,
        num_selected: int = 2,
        threshold: float = 0.2,
        policy: str = "random",
        coin: str = "train",
        counters: str = "compact",
    ) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold {threshold}; allowed: above 0, up to 1; the paper's is 0.2")
        _check_word("policy", policy, POLICIES)
        _check_word("coin", coin, COINS)
        _check_word("counters", counters, COUNTERS)
        self.num_selected, self.threshold, self.policy = num_selected, threshold, policy
        self.coin, self.counters = coin, counters

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        num_experts = scores.shape[-1]
        check_selection(num_experts, self.num_selected, "renormalised")
        experts = select_top(scores, self.num_selected)
        chosen = scores.gather(-1, experts)
        weights = chosen / chosen.sum(dim=-1, keepdim=True)
        used = self._used(weights.detach(), call)
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        if used is None:
            return Assignment(experts, weights, num_experts)
        if self.counters == "literal":
            return Assignment(experts, weights, num_experts, withdrawn=~used)
        return Assignment(torch.where(used, experts, -1), torch.where(used, weights, 0), num_experts)

    def _used(self, weights: Tensor, call: RoutingCall) -> Tensor | None:
        """Return which choices [T, K] are used; None for all of them."""
        flips = self.coin == "always" or (self.coin == "train" and call.training)
        if self.policy == "all" or self.num_selected == 1 or (self.policy == "random" and not flips):
            return None
        later = weights[:, 1:]
        if self.policy == "threshold":
            return _with_first(later >= self.threshold)
        coins = later_choice_coins(call, later.shape[0], later.shape[1], later.device)
        return _with_first(coins < later / self.threshold)


def _with_first(later: Bool[Tensor, "T N"]) -> Bool[Tensor, "T K"]:
    """Return the same with a True column before it."""
    return torch.cat([torch.ones_like(later[:, :1]), later], dim=1)


def _check_word(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise UserError(
            f"{name} {given!r} is unknown{did_you_mean(given, allowed)}; allowed: {', '.join(allowed)}"
        )


def _make(
    width: int, num_experts: int, num_selected: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    check_selection(num_experts, num_selected, "renormalised")
    rule = ThresholdSecond(num_selected, **options)
    return Router(
        width, num_experts, dtype, rule=rule, capacity=Capacity(1.25, eval_factor=2.0, order="rank")
    )


register(
    RouterInfo(
        name="st_moe",
        scores="softmax",
        selection="the best expert; others of the K best with probability g / 0.2",
        weights="renormalised over the K, before any is left out",
        capacity="1.25 in training, 2.0 in evaluation, first choices first",
        losses=("gshard", "z"),
        causal=False,
        used_by="ST-MoE",
        source="ST-MoE appendix G",
        make=_make,
    )
)
