"""Mixture-of-Depths: the best tokens of a group pass the block, the others go by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.groups import real_tokens
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection
from gatewright.parts.rules.expert_choice import column_top, exact_share
from gatewright.parts.rules.registry import RouterInfo, register


class MixtureOfDepths:
    """One expert and the identity: in training the C tokens of highest logit r in their routing group pass.

    Equation: Raposo et al. 2024: y = r f(x) + x for the top C of the sequence, y = x for the others.
    The weight is r itself, as it is; "+ x" is the residual of the block around this layer, so that a layer
    must not add another. In evaluation a token passes where r > 0, which looks at no other token.
    `sums["depth"]`: binary cross-entropy of sigmoid(r) against "passed in the top C", summed over tokens,
    with gradient to the router; it moves the top C to r > 0.
    Args: `capacity_share` C / S, above 0 and up to 1. The routing group is the paper's sequence: set
    `group_size` to S. C = min(n, ceil(share n)) of n real tokens, since the paper names no rounding; of equal
    logits the first token passes; tokens keep the order of their positions.
    Differs: the paper routes attention and feed-forward at once; this layer routes what it is given.
    Raises: UserError for a share outside (0, 1].
    """

    def __init__(self, capacity_share: int | float = 0.125) -> None:
        if not 0 < capacity_share <= 1:
            raise UserError(
                f"capacity_share {capacity_share}; allowed: above 0, up to 1; 0.125 passes one token in eight"
            )
        self.share = exact_share(capacity_share, 1)

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who passes."""
        top, _ = column_top(logits, self.share, call)
        passing = top
        if not call.training:
            real = real_tokens(call.mask, logits.shape[0], logits.device).unsqueeze(-1)
            passing = (logits > 0) & real
        guessed = F.binary_cross_entropy_with_logits(logits, top.to(logits.dtype), reduction="none")
        if call.mask is not None:
            guessed = torch.where(call.mask.unsqueeze(-1), guessed, 0)
        return Assignment(
            experts=torch.where(passing, 0, -1),
            weights=torch.where(passing, scores, 0),
            num_experts=1,
            sums={"depth": guessed.sum()},
        )


def _make(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    capacity_share: int | float = 0.125,
) -> Router:
    if num_experts != 1:
        raise UserError(
            f"mixture_of_depths with num_experts {num_experts}; allowed: 1; the other choice is to pass by"
        )
    check_selection(num_experts, num_selected, "raw")
    return Router(width, 1, dtype, rule=MixtureOfDepths(capacity_share), scores="identity")


register(
    RouterInfo(
        name="mixture_of_depths",
        scores="identity",
        selection="training: the C tokens of highest logit pass the one expert; evaluation: logits above 0",
        weights="the logit",
        capacity="C = share x group (training)",
        losses=("depth",),
        causal=False,
        causal_in_eval=True,
        used_by="Mixture-of-Depths",
        source="Raposo et al. 2024 (arXiv 2404.02258)",
        make=_make,
        fixed_selected=1,
    )
)
