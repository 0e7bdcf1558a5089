"""Who goes where: logits, scores and selection rules. A rule turns scores into an Assignment and nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean

WeightForm = Literal["raw", "renormalised", "softmax_selected"]
WEIGHT_FORMS: tuple[WeightForm, ...] = ("raw", "renormalised", "softmax_selected")

# Above this many choices, one stable sort costs less than one argmax pass per choice.
_ARGMAX_PASSES = 16


@dataclass(frozen=True)
class Assignment:
    """Who goes where: `experts` [T, K] int64 in falling rank (-1 = empty place), `weights` [T, K] with
    gradient, E experts.
    """

    experts: Int64[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    num_experts: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.experts.shape[0]

    @property
    def num_selected(self) -> int:
        """K, the places per token."""
        return self.experts.shape[1]


class Router(nn.Module):
    """One linear map per MoE layer, [T, D] -> logits [T, E], computed in `dtype` (in fp64 for fp64 input).

    Equation: h(x) = W_r x (Switch Transformer, eq 1), no bias. The parameter stays in its own dtype; `dtype`
    is what it is computed in (torch.bfloat16 is possible and is what selective precision, Switch table 2,
    warns of).
    """

    def __init__(self, width: int, num_experts: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the weight from a normal truncated at 2 std; std defaults to width ** -0.5."""
        std = self.weight.shape[1] ** -0.5 if std is None else std
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return logits [T, E] in `dtype` (float64 input stays float64)."""
        wide = torch.float64 if x.dtype == torch.float64 else self.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


def softmax_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return p = softmax(logits) over experts, [T, E] -> [T, E] (Switch Transformer, eq 1)."""
    return torch.softmax(logits, dim=-1)


def select_top(scores: Float[Tensor, "T E"], num_selected: int) -> Int64[Tensor, "T K"]:
    """Return the ids [T, K] of the K highest scores [T, E], highest first; among equals the lowest expert id
    first.

    torch.topk breaks ties arbitrarily, so it is not used. A NaN counts as the highest score, as in
    torch.sort. Carries no gradient.
    """
    scores = scores.detach()
    num_experts = scores.shape[-1]
    # Passes mark what they took with -inf, so scores that hold -inf themselves are sorted.
    if num_selected > _ARGMAX_PASSES or num_selected == num_experts or bool(torch.isneginf(scores).any()):
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :num_selected]
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


def token_choice(
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    num_selected: int,
    weights: WeightForm = "raw",
    mask: Bool[Tensor, "T"] | None = None,
) -> Assignment:
    """Return the assignment in which each token takes its K best experts.

    Args: `logits`, `scores` [T, E]; `mask` [T] bool, False = padding, whose places stay empty.
    Weights: "raw" keeps the scores of the chosen (Switch eq 2; OLMoE eq 1); "renormalised" divides them by
    their sum; "softmax_selected" is softmax over the chosen logits (Mixtral: Softmax(TopK(x W_g))), the same
    numbers when scores are a softmax.
    Raises: UserError for K outside 1..E, and for K = 1 < E with a normalised form (a constant gate).
    """
    check_selection(scores.shape[-1], num_selected, weights)
    experts = select_top(scores, num_selected)
    if weights == "softmax_selected":
        chosen = torch.softmax(logits.gather(-1, experts), dim=-1)
    else:
        chosen = scores.gather(-1, experts)
        if weights == "renormalised":
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    if mask is not None:
        experts = torch.where(mask.unsqueeze(-1), experts, -1)
    return Assignment(experts=experts, weights=chosen, num_experts=scores.shape[-1])
