"""ReMoE: a token uses every expert with a logit above 0; a penalty that adapts keeps their number near K."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, from_mask
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.selection_bias import Float32State

# Where lambda is held, so that an unreachable target does not make it 0 or infinite.
LEAST_PENALTY, LARGEST_PENALTY = 1e-20, 1e20


class ReLURouting(Float32State):
    """Every expert with a score above 0, at the score itself as weight; the number of experts per token
    varies, and the rule is continuous where an expert enters or leaves.

    Equation: ReMoE: R(x) = relu(x W), y = sum_e R(x)_e E_e(x). Eq 10-11: L_reg,lb = 1 / (L T)
    sum_{l,t,e} f_{l,e} R(x_t^l)_e, with f_{l,e} = E / (k T) sum_t 1[R(x_t^l)_e > 0] (no gradient). Eq 7-8:
    the loss takes lambda L_reg,lb, and after each step lambda *= alpha^sign((1 - k/E) - S), S = share of
    zeros among the T E scores; lambda_0 = 1e-8, alpha = 1.2.
    Args: `num_selected` k, the mean number of experts per token that lambda steers for; `alpha` above 1;
    `start` lambda_0, above 0.
    Returns: sums["relu_penalty"], 0-d with gradient: lambda sum_{t,e} f_e R(x_t)_e; divided by the tokens T
    it is this layer's lambda L_reg,lb (over L layers the paper takes the mean). f counts this call's real
    tokens: scope micro-batch.
    Raises: UserError for k outside 1..E, an alpha not above 1, a start not above 0, counts of another
    length.
    Differs: lambda stays within 1e-20 and 1e20, from where it can come back.

    A router without bias gives half of its logits above 0 on tokens that are symmetric about 0, whatever its
    weight: it needs tokens that share a direction, as a trained network's do, or `bias=True` in `make`.

    State: `penalty` 0-d fp32 (lambda), a persistent buffer that `update` moves.
    """

    penalty: Tensor

    def __init__(self, num_experts: int, num_selected: int, alpha: float = 1.2, start: float = 1e-8) -> None:
        super().__init__()
        check_selection(num_experts, num_selected, "raw")
        if not 1 < alpha < float("inf"):
            raise UserError(f"alpha {alpha}; allowed: above 1; the paper has 1.2 per step")
        if not LEAST_PENALTY <= start <= LARGEST_PENALTY:
            raise UserError(
                f"start {start}; allowed: {LEAST_PENALTY:g} to {LARGEST_PENALTY:g}; the paper has 1e-8"
            )
        self.num_experts, self.num_selected, self.alpha = num_experts, num_selected, alpha
        self.register_buffer("penalty", torch.tensor(start, dtype=torch.float32))

    def forward(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where; in compiled code with E places per token."""
        chosen = scores.detach() > 0
        if call.mask is not None:
            chosen = chosen & call.mask.unsqueeze(-1)
        assignment = from_mask(chosen, scores)
        sums = {"relu_penalty": self._penalty_sum(chosen, scores, call.mask)}
        return Assignment(assignment.experts, assignment.weights, self.num_experts, sums=sums)

    @torch.no_grad()
    def update(self, counts: Int64[Tensor, "E"], tokens: int | Int64[Tensor, ""]) -> None:
        """Move lambda once, by the loads `counts` of the `tokens` real tokens of one optimizer step."""
        if counts.shape != (self.num_experts,):
            raise UserError(
                f"counts of {tuple(counts.shape)} with num_experts {self.num_experts}; allowed: one load per "
                "expert"
            )
        # (1 - k/E) - S times T E, in whole numbers: S T E = T E - sum of counts.
        surplus = (counts.sum() - self.num_selected * tokens).to(self.penalty.device)
        moved = self.penalty * self.alpha ** torch.sign(surplus).to(torch.float32)
        self.penalty.copy_(moved.clamp(LEAST_PENALTY, LARGEST_PENALTY))

    def _penalty_sum(
        self, chosen: Bool[Tensor, "T E"], scores: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None
    ) -> Float[Tensor, ""]:
        wide = torch.promote_types(scores.dtype, torch.float32)
        num_tokens = max(chosen.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
        # int32: summing booleans in int64 costs several times as much.
        counts = chosen.sum(dim=0, dtype=torch.int32).to(wide)
        share = self.num_experts / self.num_selected * counts / num_tokens
        # relu stops the gradient of the others as a mask does, at a fifth of the time.
        used = (torch.relu(scores) if mask is None else torch.where(chosen, scores, 0)).to(wide).sum(dim=0)
        return self.penalty.to(wide) * (share * used).sum()


def _make(
    width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    bias = options.pop("bias", False)
    rule = ReLURouting(num_experts, num_selected, **options)
    return Router(width, num_experts, dtype, rule=rule, scores="relu", bias=bias)


register(
    RouterInfo(
        name="remoe",
        scores="relu",
        selection="every expert with a score above 0; K of them on average, by a penalty that adapts",
        weights="raw scores",
        capacity="none",
        losses=("relu",),
        causal=True,
        used_by="ReMoE",
        source="ReMoE eq 7-11",
        make=_make,
    )
)
