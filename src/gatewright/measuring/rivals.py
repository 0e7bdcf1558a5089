"""transformers' own experts behind a plain router, as the sides that our layer is timed against."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.conversion.mixtral import mixtral_experts
from gatewright.measuring.grid import Dtype, Shape, gathered_bytes

# The names of transformers' implementations that run on a CPU.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
LARGEST_GATHER = 1 << 30


def transformers_version() -> str | None:
    """Return the version that is installed, None without it; importing nothing of it."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from importlib.metadata import version

    return version("transformers")


def too_large(implementation: str, shape: Shape, dtype: Dtype) -> str | None:
    """Return why one implementation is left out of a row before it is tried, or None."""
    gathered = gathered_bytes(shape, dtype)
    if implementation == "batched_mm" and gathered > LARGEST_GATHER:
        return (
            f"copies {gathered / (1 << 30):.1f} GiB of weights per call, one set for every choice of a token"
        )
    return None


class TransformersLayer(nn.Module):
    """Mixtral's experts in one of transformers' implementations, and Mixtral's router written out:
    logits in the activations' dtype, softmax in fp32, the K best, renormalised (raw for one choice, as ours).
    """

    def __init__(self, shape: Shape, implementation: str) -> None:
        super().__init__()
        self.num_selected = shape.num_selected
        self.router = nn.Parameter(torch.empty(shape.num_experts, shape.width))
        self.experts = mixtral_experts(shape.width, shape.num_experts, shape.expert_width, implementation)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return y [T, D], and what the balance loss is made of: probabilities [T, E], experts [T, K]."""
        probabilities = F.softmax(F.linear(x, self.router).float(), dim=-1)
        weights, experts = torch.topk(probabilities, self.num_selected)
        if self.num_selected > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, experts, weights), (probabilities, experts)


def switch_balance(seen: tuple[Tensor, Tensor]) -> Tensor:
    """Return E sum_e f_e P_e, f the shares of all choices and P the mean probabilities, 1 when balanced."""
    probabilities, experts = seen
    num_experts = probabilities.shape[1]
    f = torch.bincount(experts.flatten(), minlength=num_experts) / experts.numel()
    return num_experts * (f * probabilities.mean(dim=0)).sum()
