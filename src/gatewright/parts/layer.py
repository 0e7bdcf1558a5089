"""MoELayer: the whole flow of a token-choice Mixture-of-Experts layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, choose_backend
from gatewright.parts.dispatch import count_assignments, expert_capacity, make_plan
from gatewright.parts.experts import MLP, Experts
from gatewright.parts.routing import (
    Assignment,
    Router,
    WeightForm,
    check_selection,
    softmax_scores,
    token_choice,
)
from gatewright.parts.stats import RouterStats, Stats


class MoELayer(nn.Module):
    """A drop-in feed-forward layer of E experts of which each token uses K: x [..., D] -> (y [..., D],
    Stats).

    1. router: x -> logits -> scores, in at least fp32 by default
    2. selection rule: scores -> Assignment (K experts and weights per token)
    3. plan: Assignment -> DispatchPlan (sorted by expert; beyond capacity dropped)
    4. experts and combine: y_t = sum_k weight[t, k] FFN_{expert[t, k]}(x_t), dropped choices adding zero
    5. shared experts: one plain MLP that every token passes, added with weight 1

    Args: `capacity_factor` None is dropless, else C = ceil(f K T / E) over all tokens of the call;
    `router_dtype` is what the router computes in; `num_shared_experts` n makes the shared MLP n *
    expert_width wide; `backend` as `kernels.choose_backend`.
    Equation: Switch Transformer eq 2 ("raw"), Mixtral section 2.1 ("renormalised", the default).
    Raises: UserError for K outside 1..E, an unknown name, or a weight form that cannot train the router.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_selected: int,
        expert_width: int,
        *,
        activation: str = "swiglu",
        weights: WeightForm = "renormalised",
        num_shared_experts: int = 0,
        capacity_factor: float | None = None,
        router_dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_selection(num_experts, num_selected, weights)
        if min(width, expert_width) < 1 or num_shared_experts < 0:
            raise UserError(
                f"width {width}, expert_width {expert_width}, num_shared_experts {num_shared_experts}; "
                "allowed: widths of 1 or "
                "more, shared experts of 0 or more"
            )
        if capacity_factor is not None:
            expert_capacity(capacity_factor, num_selected, 0, num_experts)
        choose_backend(backend)
        self.num_experts, self.num_selected, self.weights = num_experts, num_selected, weights
        self.capacity_factor, self.backend = capacity_factor, backend
        self.router = Router(width, num_experts, router_dtype)
        self.experts = Experts(width, num_experts, expert_width, activation)
        self.shared = (
            MLP(width, num_shared_experts * expert_width, activation) if num_shared_experts else None
        )

    def forward(
        self, x: Float[Tensor, "*batch D"], mask: Tensor | None = None, capture: bool = False
    ) -> tuple[Float[Tensor, "*batch D"], Stats]:
        """Return (y, Stats). `mask` [...] bool: False = padding, which takes no capacity, enters no
        statistic and gets 0.
        """
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise UserError(
                f"mask {mask.dtype} {tuple(mask.shape)} for x {tuple(x.shape)}; allowed: torch.bool "
                f"{tuple(x.shape[:-1])}; "
                "give one truth value per token"
            )
        flat = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        if flat_mask is not None:
            # Padding may hold NaN: where, not multiply, keeps it out of values and gradients.
            flat = torch.where(flat_mask.unsqueeze(-1), flat, 0)
        logits = self.router(flat)
        scores = softmax_scores(logits)
        assignment = token_choice(logits, scores, self.num_selected, self.weights, flat_mask)
        num_tokens = flat.shape[0] if flat_mask is None else int(flat_mask.sum())
        capacity = None
        if self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, self.num_selected, num_tokens, self.num_experts)
        plan = make_plan(assignment, capacity)
        y = self.experts(_activation_dtype(flat), plan, assignment.weights, self.backend)
        if self.shared is not None:
            y = y + self.shared(flat)
        stats = _record(logits, scores, assignment, plan, flat_mask, capture)
        return y.reshape(x.shape), Stats({"router": stats})


def _activation_dtype(x: Tensor) -> Tensor:
    """Under autocast, cast to its dtype: the experts' grouped matmuls are not on autocast's own list."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:  # autocast leaves fp64 alone
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _record(
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    assignment: Assignment,
    plan: DispatchPlan,
    mask: Bool[Tensor, "T"] | None,
    capture: bool,
) -> RouterStats:
    """Reduce one call to its sufficient statistics."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(wide), dim=-1)
    # Not from lse: a lone -inf among the logits vanishes there.
    finite = torch.isfinite(logits).all(dim=-1)
    wide_scores = scores.to(wide)
    if mask is not None:
        wide_scores = torch.where(mask.unsqueeze(-1), wide_scores, 0)
        lse = torch.where(mask, lse, 0)
    counts = count_assignments(assignment)
    places, held = assignment.experts >= 0, plan.slots >= 0
    real = torch.full((), places.shape[0], device=counts.device) if mask is None else mask.sum()
    none = torch.zeros((), dtype=torch.int64, device=counts.device)
    return RouterStats(
        num_selected=assignment.num_selected,
        tokens=real,
        counts=counts,
        kept=plan.counts,
        dropped_by_rank=none.expand(places.shape[1]) if plan.all_kept else (places & ~held).sum(dim=0),
        unrouted=none if plan.all_kept else (places.any(dim=1) & ~held.any(dim=1)).sum(),
        score_sums=wide_scores.sum(dim=0),
        logsumexp_sum=lse.sum(),
        logsumexp_square_sum=(lse * lse).sum(),
        nonfinite=(~finite).sum(),
        logits=logits.detach() if capture else None,
        scores=scores.detach() if capture else None,
        experts=torch.where(held, assignment.experts, -1) if capture else None,
        combine_weights=assignment.weights.detach() if capture else None,
    )
