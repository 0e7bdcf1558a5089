"""Top-p: each token takes as many of its best experts as it needs to be p sure."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, select_top
from gatewright.parts.rules.registry import RouterInfo, register


class TopP:
    """Each token takes the shortest row of its best experts whose scores sum to p or more, at raw weight.

    Equation: Huang et al. 2024, "Harder tasks need more experts", section 3: with P = softmax(l) sorted
    falling, K_t = min k such that P_1 + ... + P_k >= p. Their loss beside the balance loss, the mean over
    tokens of H(P) = -sum_e P_e ln P_e, is made of sums["entropy"]; without it training flattens P to buy
    experts.
    Args: `p` in (0, 1]; `at_most` caps K_t, None (or E) leaves it free: 1 to E. Places are as many as the
    busiest token needs; compiled code, and a cap, take the most possible.
    A layer's capacity, if it has one, counts K = the cap for every token, not what tokens take.
    Raises: UserError for a p outside (0, 1] and a cap outside 1..E.
    Differs: the released inference code stops at the first sum above p, not at p itself: one more expert
    where a sum is p exactly.
    """

    def __init__(self, p: float = 0.4, at_most: int | None = None) -> None:
        if not 0 < p <= 1:
            raise UserError(f"p {p}; allowed: above 0, up to 1 (every expert); the paper's code has 0.4")
        if at_most is not None and at_most < 1:
            raise UserError(f"at_most {at_most}; allowed: 1 or more experts per token, or none for no cap")
        self.p, self.at_most = p, at_most

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where; `sums` holds "entropy", summed over tokens."""
        num_experts = scores.shape[-1]
        cap = num_experts if self.at_most is None else self.at_most
        _check_cap(cap, num_experts)
        experts = select_top(scores, cap)
        summed = scores.detach().gather(-1, experts).to(_wide(scores)).cumsum(dim=-1)
        # An expert is needed where those before it do not reach p; the first always is.
        needed = torch.cat([torch.ones_like(summed[:, :1], dtype=torch.bool), summed[:, :-1] < self.p], dim=1)
        if call.mask is not None:
            needed = needed & call.mask.unsqueeze(-1)
        if cap == num_experts and not torch.compiler.is_compiling():
            # int32: summing booleans in int64 costs nine times as much.
            places = max(int(needed.sum(dim=1, dtype=torch.int32).max()), 1) if needed.shape[0] else 1
            experts, needed = experts[:, :places], needed[:, :places]
        return Assignment(
            experts=torch.where(needed, experts, -1),
            weights=torch.where(needed, scores.gather(-1, experts), 0),
            num_experts=num_experts,
            sums={"entropy": _entropy(scores, call.mask)},
        )


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _entropy(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over tokens of -sum_e P_e ln P_e, 0-d; 0 ln 0 is 0, in value and in gradient."""
    shares = scores.to(_wide(scores))
    if mask is not None:
        shares = torch.where(mask.unsqueeze(-1), shares, 0)
    return -(shares * torch.where(shares > 0, shares, 1).log()).sum()


def _check_cap(cap: int, num_experts: int) -> None:
    if not 1 <= cap <= num_experts:
        raise UserError(
            f"at_most {cap} with num_experts {num_experts}; allowed: 1 to {num_experts}, or none for no cap"
        )


def _make(
    width: int,
    num_experts: int,
    num_selected: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Router:
    _check_cap(num_experts if num_selected is None else num_selected, num_experts)
    return Router(width, num_experts, dtype, rule=TopP(at_most=num_selected, **options))


register(
    RouterInfo(
        name="top_p",
        scores="softmax",
        selection="each token its best experts until their scores sum to p; at most K",
        weights="raw scores",
        capacity="none",
        losses=("balance", "entropy"),
        causal=True,
        used_by="dynamic routing (2024)",
        source="Huang et al. 2024",
        make=_make,
    )
)
