"""Strictly balanced gating: in training experts pick as many tokens each; in evaluation thresholds decide."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, from_mask
from gatewright.parts.rules.expert_choice import column_top, exact_share
from gatewright.parts.rules.registry import RouterInfo, register


class StrictlyBalanced(nn.Module):
    """Each expert takes the m = K n / E tokens of its routing group of n that score highest with it; learned
    `thresholds` T [E] stand in for that choice in evaluation.

    Equation: Shazeer et al. 2017, appendix F, with X = softmax(x W_g):
    (18) M_batchwise(X, m)_{j,i} = 1 where X_{j,i} is among the top m of column i;
    (16) G_i = X_i M_i / sum_j X_j M_j;
    (19) in evaluation M_threshold(x, T)_i = 1 where X_i > T_i;
    (20) L_batchwise = sum_j sum_i (M_threshold - M_batchwise)_{j,i} (X_{j,i} - T_i), which is 0 or more and 0
    where the masks agree. It is `sums["threshold"]`, the masks being constants: dL/dT_i is m less the number
    of tokens above T_i, and X gets its part too. It is added in evaluation too, as a measure of agreement.
    Differs: m = min(n, ceil(K n / E)), n counting real tokens (the paper's m is whole); a token that no
    expert takes has no weights instead of 0 / 0; T starts at 1 / (E + 1), which the paper does not say.
    Causal in evaluation only.
    """

    def __init__(self, num_experts: int, num_selected: int) -> None:
        super().__init__()
        check_selection(num_experts, num_selected, "raw")
        self.share = exact_share(num_selected, num_experts)
        self.thresholds = nn.Parameter(torch.full((num_experts,), 1 / (num_experts + 1)))

    def forward(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        limits = self.thresholds.to(scores.dtype)
        by_batch, _ = column_top(scores, self.share, call)
        by_threshold, seen = scores > limits, scores
        if call.mask is not None:
            real = call.mask.unsqueeze(-1)
            by_threshold, seen = by_threshold & real, torch.where(real, scores, 0)
        # Equation 20 with its sum taken apart, which spares two passes over [T, E].
        apart = (by_threshold.view(torch.int8) - by_batch.view(torch.int8)).to(scores.dtype)
        lost = torch.dot(apart.reshape(-1), seen.reshape(-1)) - torch.dot(apart.sum(dim=0), limits)
        chosen = by_batch if call.training else by_threshold
        made = from_mask(chosen, scores)
        total = made.weights.sum(dim=-1, keepdim=True)
        weights = made.weights / torch.where(total > 0, total, 1)
        return Assignment(made.experts, weights, made.num_experts, sums={"threshold": lost})


def _make(width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32) -> Router:
    rule = StrictlyBalanced(num_experts, num_selected)
    return Router(width, num_experts, dtype, rule=rule, scores="softmax")


register(
    RouterInfo(
        name="batchwise",
        scores="softmax",
        selection="training: each expert its K n / E best tokens; evaluation: scores above thresholds",
        weights="renormalised over the chosen",
        capacity="exactly full by construction (training)",
        losses=("threshold",),
        causal=False,
        causal_in_eval=True,
        used_by="Shazeer et al. 2017 (translation of one language pair)",
        source="Shazeer et al. 2017 appendix F, eq 16-20",
        make=_make,
    )
)
