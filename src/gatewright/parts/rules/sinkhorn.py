"""Sinkhorn: in training tokens choose from a plan whose rows and columns carry equal mass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.groups import from_groups, real_tokens, to_groups
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.rules.registry import RouterInfo, register

_EPSILON = 1e-8


def column_scales(
    logits: Float[Tensor, "T E"], call: RoutingCall, tolerance: int | float, most: int
) -> tuple[Float[Tensor, "G E"], int]:
    """Return the factors d1 [G, E] that make exp(logits) d1 the plan, up to a factor per row, and the
    rounds gone.

    A group stops on its own, so that its plan does not depend on the other groups of the call: once d1
    changes by at most `tolerance` of its mean, after `most` rounds at the latest. No gradient.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A token's largest logit becomes 0: exp overflows at 89, and factors of a row change no plan.
        costs = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
        real = real_tokens(call.mask, logits.shape[0], logits.device).unsqueeze(-1)
        real = real & costs.isfinite().all(dim=-1, keepdim=True)
        costs = to_groups(torch.where(real, costs, 0), call.group_size)
        rows = to_groups(real.to(wide.dtype), call.group_size)
        rows = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
        columns = torch.full_like(costs[:, 0], 1.0).unsqueeze(-1)
        share = 1 / costs.shape[-1]
        open_groups = torch.ones_like(columns[:, :1], dtype=torch.bool)
        gone = 0
        while gone < most:
            per_row = rows / (costs @ columns + _EPSILON)
            following = share / (costs.mT @ per_row + _EPSILON)
            change = (following - columns).abs().mean(dim=1, keepdim=True)
            change = change / following.mean(dim=1, keepdim=True)
            columns = torch.where(open_groups, following, columns)
            open_groups = open_groups & (change > tolerance)
            gone += 1
            if not torch.compiler.is_compiling() and not bool(open_groups.any()):
                break
        return columns.squeeze(-1), gone


class Sinkhorn:
    """In training each token takes the K experts that carry most of its row in a balanced plan, in evaluation
    those of its highest scores.

    Equation (S-BASE in Clark et al. 2022, as Megatron-LM computes it): C = exp(L), d1 = 1; then in turn
    d0_t = (1/n) / (sum_e C_te d1_e + 1e-8) and d1_e = (1/E) / (sum_t d0_t C_te + 1e-8), until d1 changes by
    at most 1e-4, in the mean; plan P = d0 C d1 with rows of 1/n and columns of 1/E. The choice is the top K
    of P; the weight is the score of the chosen, from the raw logits: sigmoid(L) for K = 1, else softmax(L)
    over all experts, not renormalised. The plan carries no gradient.
    Args: `max_rounds` caps the rounds (compiled code does them all, a converged group standing still).
    Column sums are even, the loads need not be, and in evaluation less so: use it dropless.
    Differs: each row's largest logit is subtracted first (P stays, up to the 1e-8, and nothing overflows).
    The change is measured against the mean of d1, and there is a cap: with skewed logits d1 is large and the
    1e-8 keeps it drifting, so that an absolute 1e-4 is never met. Routing groups are balanced each by itself;
    padding has no row, and a token with a non-finite logit takes no part in the plan.
    Raises: UserError for K outside 1..E and for fewer than one round.
    """

    def __init__(
        self, num_experts: int, num_selected: int, tolerance: int | float = 1e-4, max_rounds: int = 20
    ) -> None:
        check_selection(num_experts, num_selected, "raw")
        if max_rounds < 1 or not tolerance >= 0:
            raise UserError(
                f"max_rounds {max_rounds}, tolerance {tolerance}; allowed: 1 round or more, a tolerance of 0 "
                "or more; 20 and 1e-4 are the defaults"
            )
        self.num_selected, self.tolerance, self.max_rounds = num_selected, tolerance, max_rounds

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        ranked = scores
        if call.training and logits.shape[0]:
            scales, _ = column_scales(logits, call, self.tolerance, self.max_rounds)
            grouped = to_groups(logits.detach().to(scales.dtype), call.group_size)
            # Ranks as P does; unlike P, it tells experts apart whose share underflows.
            ranked = from_groups(grouped + scales.log().unsqueeze(1), logits.shape[0])
        experts = select_top(ranked, self.num_selected)
        weights = scores.gather(-1, experts)
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        return Assignment(experts, weights, scores.shape[-1])


def _make(
    width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    rule = Sinkhorn(num_experts, num_selected, **options)
    scores = "sigmoid" if num_selected == 1 else "softmax"
    return Router(width, num_experts, dtype, rule=rule, scores=scores)


register(
    RouterInfo(
        name="sinkhorn",
        scores="sigmoid (K = 1) or softmax",
        selection="training: each token its K best of a balanced plan; evaluation: its K best",
        weights="raw scores",
        capacity="none",
        losses=(),
        causal=False,
        causal_in_eval=True,
        used_by="S-BASE, Megatron-LM",
        source="Clark et al. 2022 (S-BASE), Megatron-LM",
        make=_make,
    )
)
