"""Expert choice: each expert takes its best tokens of the routing group, so that every load is the same."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.groups import from_groups, real_tokens, to_groups
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, from_mask
from gatewright.parts.rules.registry import RouterInfo, register

# Section 3.3 of the paper.
_ENTROPY, _ITERATIONS = 0.001, 100


def exact_share(share: int | float, num_experts: int) -> tuple[int, int]:
    """Return share / E as numerator and denominator, reading the decimal that was written (0.1 is 1/10)."""
    exact = Fraction(str(share)) / num_experts
    return exact.numerator, exact.denominator


def column_places(share: tuple[int, int], tokens: Int64[Tensor, "G"]) -> Int64[Tensor, "G"]:
    """Return how many of its n tokens each expert of a group takes, [G]: min(n, ceil(share n))."""
    return torch.minimum((tokens * share[0] + share[1] - 1) // share[1], tokens)


def column_top(
    values: Float[Tensor, "T E"], share: tuple[int, int], call: RoutingCall
) -> tuple[Bool[Tensor, "T E"], Int64[Tensor, "G"]]:
    """Return which tokens stand among the highest of each expert's column, [T, E], and how many in each
    group, [G].

    A group of n real tokens gives every column min(n, ceil(share n)). Of equal values the first token is
    taken; a NaN stands last. Carries no gradient; no shape depends on the numbers.
    """
    num_tokens = values.shape[0]
    rows = to_groups(values.detach(), call.group_size)
    count, size = rows.shape[:2]
    real = to_groups(real_tokens(call.mask, num_tokens, values.device).unsqueeze(-1), call.group_size)
    whole = call.mask is None and count * size == num_tokens
    if not whole:
        rows = torch.where(real, rows, -torch.inf)
    places = column_places(share, real.sum(dim=(1, 2)))
    most = min(size, (size * share[0] + share[1] - 1) // share[1])
    if most == 0:
        return torch.zeros_like(values, dtype=torch.bool), places
    limit = places.view(-1, 1, 1)
    eager = not torch.compiler.is_compiling()
    if not eager or bool(rows.amax().isnan()):
        rows = _nan_last(rows)
    lowest = _lowest_taken(rows.transpose(1, 2).contiguous(), limit, most, whole).transpose(1, 2)
    taken = rows >= lowest
    # As many values as there are places reach the lowest one taken: there are no ties to part.
    if not (eager and bool((taken.sum(dim=1, keepdim=True, dtype=torch.int32) == limit).all())):
        above, level = rows > lowest, (rows == lowest) & real
        left = limit - above.sum(dim=1, keepdim=True, dtype=torch.int32)
        taken = above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= left))
    return from_groups(taken, num_tokens), places


def _lowest_taken(
    columns: Float[Tensor, "G E S"], limit: Int64[Tensor, "G 1 1"], most: int, whole: bool
) -> Float[Tensor, "G E 1"]:
    """Return each column's `limit`-th highest value; `whole` says that every limit is `most`."""
    eager = columns.is_cpu and not torch.compiler.is_compiling()
    if whole and eager and columns.dtype in (torch.float32, torch.float64):
        # numpy selects by vector instructions: 2 ms against topk's 11 for 64 columns of 16,384.
        place = columns.shape[-1] - most
        return torch.from_numpy(np.partition(columns.numpy(), place, axis=-1)[..., place : place + 1])
    highest = torch.topk(columns, most, dim=-1).values
    return highest.gather(-1, (limit - 1).clamp(min=0).expand(-1, columns.shape[1], 1))


def _nan_last(rows: Float[Tensor, "G S E"]) -> Float[Tensor, "G S E"]:
    return torch.nan_to_num(rows, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


class ExpertChoice:
    """Each expert takes the k = c n / E tokens of its routing group of n that score highest with it.

    Equation: Zhou et al. 2022, eq 1-2: S = softmax(X W_g) over experts, (G, I) = TopK(S^T, k); weights are
    the scores as they are, so a token that k experts want is a sum of k outputs and one that none wants
    gets 0. Exactly k per expert by construction, so there is no balance loss.
    Args: `capacity_factor` c, the mean number of experts per token, above 0 and up to E. `most_per_token` b:
    section 3.3, at most b experts per token, by choosing from A = argmax <S^T, A> + 0.001 H(A) with rows
    summing to k, columns to at most b and 0 <= A <= 1, in 100 rounds of Dykstra's algorithm: seconds for
    16,384 tokens and 64 experts, and a few tokens, that the last round has not settled, may pass b.
    Not causal, in evaluation neither: whether a token is taken depends on all tokens of its group.
    Differs: the paper names no rounding; here k = min(n, ceil(c n / E)), n counting real tokens.
    Flaxformer lets an expert that runs out of real tokens take padding; here padding is never taken.
    Raises: UserError for factors and limits that no expert can have.
    """

    def __init__(
        self, num_experts: int, capacity_factor: int | float = 2, most_per_token: int | None = None
    ) -> None:
        if not 0 < capacity_factor <= num_experts:
            raise UserError(
                f"capacity_factor {capacity_factor} with num_experts {num_experts}; allowed: above 0, up to "
                f"{num_experts}; it is the mean number of experts per token"
            )
        if most_per_token is not None and not capacity_factor <= most_per_token:
            raise UserError(
                f"most_per_token {most_per_token} with capacity_factor {capacity_factor}; allowed: "
                f"{math.ceil(capacity_factor)} or more, or none; experts fill all their places"
            )
        self.capacity_factor, self.most_per_token = capacity_factor, most_per_token
        self.share = exact_share(capacity_factor, num_experts)

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        ranked = scores.detach()
        if self.most_per_token is not None:
            ranked = capped(ranked, self.share, self.most_per_token, call)
        chosen, _ = column_top(ranked, self.share, call)
        return from_mask(chosen, scores)


def capped(
    scores: Float[Tensor, "T E"], share: tuple[int, int], most: int, call: RoutingCall
) -> Float[Tensor, "T E"]:
    """Return log A [T, E] of section 3.3, the relaxed choice with at most `most` experts per token.

    Equation: A = argmax <S, A> + lambda H(A) has log A = (S + a_e - b_t - c_te) / lambda, with prices a for
    the sum of an expert's column, b >= 0 for the limit of a token's row and c >= 0 for A <= 1. Dykstra's
    rounds meet the three sets in turn, setting one kind of price each.
    Differs: lambda falls from 0.1 to the paper's 0.001 over nine tenths of the rounds, and columns come last.
    With 0.001 throughout, prices move so little at a time that 100 rounds leave most limits broken.
    """
    real = to_groups(real_tokens(call.mask, scores.shape[0], scores.device).unsqueeze(-1), call.group_size)
    wide = torch.promote_types(scores.dtype, torch.float32)
    gains = torch.nan_to_num(to_groups(scores.to(wide), call.group_size), nan=0.0)
    gains = torch.where(real, gains, -torch.inf)
    held = column_places(share, real.sum(dim=(1, 2))).clamp(min=1).to(wide).log().view(-1, 1, 1)
    expert, token = torch.zeros_like(gains[:, :1]), torch.zeros_like(gains[..., :1])
    entry = torch.zeros_like(gains)
    for i in range(_ITERATIONS):
        blur = max(_ENTROPY, 0.1 * (_ENTROPY / 0.1) ** (i / (0.9 * _ITERATIONS)))
        entry = torch.where(real, gains + expert - token, 0).clamp(min=0)
        total = torch.logsumexp((gains + expert - entry) / blur, dim=2, keepdim=True)
        token = torch.where(real, blur * (total - math.log(most)), 0).clamp(min=0)
        total = torch.logsumexp((gains - token - entry) / blur, dim=1, keepdim=True)
        expert = torch.where(total.isfinite(), blur * (held - total), 0)
    return from_groups((gains + expert - token - entry) / _ENTROPY, scores.shape[0])


def _make(
    width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    check_selection(num_experts, num_selected, "raw")
    rule = ExpertChoice(num_experts, **{"capacity_factor": num_selected, **options})
    return Router(width, num_experts, dtype, rule=rule, scores="softmax")


register(
    RouterInfo(
        name="expert_choice",
        scores="softmax",
        selection="each expert its K n / E best tokens of the routing group",
        weights="raw scores",
        capacity="exactly full by construction",
        losses=(),
        causal=False,
        causal_in_eval=False,
        used_by="Expert Choice",
        source="Expert Choice eq 1-4",
        make=_make,
    )
)
