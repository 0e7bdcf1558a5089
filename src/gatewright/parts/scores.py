"""From logits to scores: what an expert is worth to a token, before anything is selected."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean

ScoreFunction = Callable[[Tensor], Tensor]


def softmax_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return p = softmax(logits) over experts, [T, E] -> [T, E] (Switch Transformer, eq 1)."""
    return torch.softmax(logits, dim=-1)


def sigmoid_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return s = sigmoid(logits), each expert on its own, [T, E] -> [T, E] (DeepSeek-V3, eq 15)."""
    return torch.sigmoid(logits)


def sqrt_softplus_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return s = sqrt(softplus(logits)), [T, E] -> [T, E] (released inference code of DeepSeek-V4)."""
    return torch.sqrt(F.softplus(logits))


def relu_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return r = relu(logits), [T, E] -> [T, E]: zero is "not selected" (ReMoE)."""
    return torch.relu(logits)


def identity_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return the logits themselves, [T, E] -> [T, E] (Mixture-of-Depths)."""
    return logits


SCORES: dict[str, ScoreFunction] = {
    "softmax": softmax_scores,
    "sigmoid": sigmoid_scores,
    "sqrt_softplus": sqrt_softplus_scores,
    "relu": relu_scores,
    "identity": identity_scores,
}


def score_function(scores: str | ScoreFunction) -> ScoreFunction:
    """Return the score function of that name, or the function itself. Raises: UserError for other names."""
    if callable(scores):
        return scores
    if scores not in SCORES:
        raise UserError(
            f"scores {scores!r} is unknown{did_you_mean(scores, SCORES)}; allowed: {', '.join(SCORES)}"
        )
    return SCORES[scores]


def native_name(function: ScoreFunction) -> str | None:
    """Return how `kernels.fused_route` calls a score function, None for those that it does not have."""
    return next((name for name in ("softmax", "sigmoid", "identity") if function is SCORES[name]), None)


def probabilities(
    function: ScoreFunction, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"]
) -> Float[Tensor, "T E"]:
    """Return scores normalised over experts, [T, E]: what balance losses call P (DeepSeek-V3, eq 19).

    A softmax is returned as it is; scores without a sign of their own (the identity) take a softmax; a token
    whose scores are all 0 keeps zeros.
    """
    if function is softmax_scores:
        return scores
    if function is identity_scores:
        return torch.softmax(logits, dim=-1)
    total = scores.sum(dim=-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1)
