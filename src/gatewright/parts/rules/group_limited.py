"""Group-limited choice: each token takes its K best experts inside its best groups of experts, chosen by
biased scores and weighed by unbiased ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean
from gatewright.kernels import TopK
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.selection_bias import SelectionBias

GROUP_SCORES = ("max", "top2")

# A sum of scores below this is taken for it: scores that all underflow weigh 0, not NaN.
_LEAST_SUM = 1e-20


class GroupLimited(nn.Module):
    """Experts stand in `num_groups` groups of neighbours (devices, nodes); a token keeps its `groups_kept`
    best groups and takes its K best experts there.

    Equation: DeepSeek-V2 section 2.2.2 (group score "max": a device is as good as its best expert);
    DeepSeek-V3 eq 12-16 and section 2.1.2: with z = s + b, groups by the sum of their two highest z
    ("top2"), experts by z inside them, g'_i = s_i for the chosen, g_i = g'_i / sum g' ("renormalised"),
    times `scale`. Among equal groups the lowest id is kept, as among equal experts.
    Args: `num_groups` divides E; `groups_kept` in 1..num_groups, together holding K experts; `weights` "raw"
    keeps the scores of the chosen; `scale` above 0 (DeepSeek-V2 236B 16, Lite 1, V3 2.5); `bias` is trained
    by `update`, None is no bias.
    Returns: with more groups than one, sums["device_counts"] [num_groups] int64, without gradient: the
    tokens that send at least one choice to each group (f'' of DeepSeek-V2's communication loss, before its
    factor D / (M T)).
    Raises: UserError for groups that do not divide E or cannot hold K, a weight form or group score that is
    unknown, a scale that is not above 0, and K = 1 < E with renormalised weights (a constant gate).
    Differs: V3's text sums the K / M best scores of a group; its code, and this, the two best (the same at
    its K = 8, M = 4). Losing groups are out of the choice at -inf; zeroing their scores, as some code does,
    lets them win wherever biased scores are negative.
    """

    def __init__(
        self,
        num_experts: int,
        num_selected: int,
        num_groups: int = 1,
        groups_kept: int = 1,
        group_score: str = "max",
        weights: str = "raw",
        scale: float = 1.0,
        bias: SelectionBias | None = None,
    ) -> None:
        super().__init__()
        check_selection(num_experts, num_selected, weights)
        if weights == "softmax_selected":
            raise UserError(
                "weights 'softmax_selected' after a group limit; allowed: raw, renormalised; no paper has it"
            )
        if group_score not in GROUP_SCORES:
            raise UserError(
                f"group_score {group_score!r} is unknown{did_you_mean(group_score, GROUP_SCORES)}; allowed: "
                f"{', '.join(GROUP_SCORES)}"
            )
        if not scale > 0:
            raise UserError(f"scale {scale}; allowed: above 0; 1 leaves the weights as they are")
        _check_groups(num_experts, num_selected, num_groups, groups_kept)
        self.num_experts, self.num_selected = num_experts, num_selected
        self.num_groups, self.groups_kept, self.group_score = num_groups, groups_kept, group_score
        self.weights, self.scale, self.bias = weights, scale, bias

    def forward(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        ranked = scores.detach() if self.bias is None else self.bias(scores)
        if self.groups_kept < self.num_groups:
            ranked = torch.where(self.experts_kept(ranked), ranked, -torch.inf)
        experts = select_top(ranked, self.num_selected)
        weights = scores.gather(-1, experts)
        if self.weights == "renormalised":
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_LEAST_SUM)
        if self.scale != 1.0:
            weights = weights * self.scale
        sums = {"device_counts": self._device_counts(experts, call.mask)} if self.num_groups > 1 else {}
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        return Assignment(experts, weights, self.num_experts, sums=sums)

    def as_top_k(self) -> TopK | None:
        """Return what this rule does as plain data; None with groups, or where a subclass decides."""
        plain = type(self).forward is GroupLimited.forward and self.num_groups == 1
        if not plain or not (self.bias is None or type(self.bias) is SelectionBias):
            return None
        bias = None if self.bias is None else self.bias.bias
        return TopK(self.num_selected, self.weights, self.scale, bias, _LEAST_SUM)

    def experts_kept(self, ranked: Float[Tensor, "T E"]) -> Bool[Tensor, "T E"]:
        """Return which experts stand in a kept group, by the scores that choices are made by."""
        groups = ranked.unflatten(-1, (self.num_groups, -1))
        if self.group_score == "max" or groups.shape[-1] == 1:
            totals = groups.amax(dim=-1)
        else:
            totals = _sum_of_two_best(groups)
        kept = torch.zeros_like(totals, dtype=torch.bool)
        kept = kept.scatter(-1, select_top(totals, self.groups_kept), True)
        return kept.unsqueeze(-1).expand_as(groups).flatten(-2)

    def update(self, counts: Int64[Tensor, "E"], tokens: int | Int64[Tensor, ""]) -> None:
        """Let the bias, if there is one, learn from the loads of one optimizer step."""
        if self.bias is not None:
            self.bias.update(counts, tokens)

    def _device_counts(
        self, experts: Int64[Tensor, "T K"], mask: Bool[Tensor, "T"] | None
    ) -> Int64[Tensor, "num_groups"]:
        size = self.num_experts // self.num_groups
        sent = torch.zeros(
            (experts.shape[0], self.num_groups), dtype=torch.bool, device=experts.device
        ).scatter(1, torch.div(experts, size, rounding_mode="floor"), True)
        return (sent if mask is None else sent & mask.unsqueeze(-1)).sum(dim=0)


def _sum_of_two_best(values: Tensor) -> Tensor:
    """Return the sum of the two highest values of the last axis, by a knock-out: topk takes four times as
    long.
    """
    high, low = values, torch.full_like(values, -torch.inf)
    while high.shape[-1] > 1:
        if high.shape[-1] % 2:
            high, low = (F.pad(side, (0, 1), value=-torch.inf) for side in (high, low))
        (a, b), (c, d) = high.chunk(2, dim=-1), low.chunk(2, dim=-1)
        high, low = torch.maximum(a, b), torch.maximum(torch.minimum(a, b), torch.maximum(c, d))
    return (high + low).squeeze(-1)


def _check_groups(num_experts: int, num_selected: int, num_groups: int, groups_kept: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise UserError(
            f"num_groups {num_groups} with num_experts {num_experts}; allowed: divisors of {num_experts}; "
            "groups hold equally many experts"
        )
    size = num_experts // num_groups
    least = -(-num_selected // size)
    if not least <= groups_kept <= num_groups:
        raise UserError(
            f"groups_kept {groups_kept} with num_selected {num_selected} in {num_groups} groups of {size}; "
            f"allowed: {least} to {num_groups}; keep groups that hold the experts a token takes"
        )


def make_group_limited(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    *,
    scores: str,
    num_groups: int | None = None,
    groups_kept: int | None = None,
    rate: float | None = None,
    bias_rule: str = "sign",
    normalised: bool = False,
    stop_after: int | None = None,
    **options: Any,
) -> Router:
    """Return a router with a GroupLimited rule; with a `rate`, it has a SelectionBias of that rate.

    Args: `num_groups` and `groups_kept` go together; both None is no group limit. `options` are
    GroupLimited's.
    """
    if (num_groups is None) != (groups_kept is None):
        raise UserError(
            f"num_groups {num_groups} with groups_kept {groups_kept}; allowed: both or neither; say how many "
            "groups there are and how many a token keeps"
        )
    if num_groups is None or groups_kept is None:
        num_groups, groups_kept = 1, 1
    bias = None
    if rate is not None:
        bias = SelectionBias(num_experts, rate, bias_rule, normalised=normalised, stop_after=stop_after)
    rule = GroupLimited(num_experts, num_selected, num_groups, groups_kept, bias=bias, **options)
    return Router(width, num_experts, dtype, rule=rule, scores=scores)
