"""AdamW in one fused pass, gradient clipping, and the averaged copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatewright.training.run import LoopSettings


def build_adamw(model: nn.Module, run: LoopSettings, learning_rate: float) -> torch.optim.AdamW:
    """Return fused AdamW over all parameters, with weight decay on all of them (OLMoE table 10)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        betas=(run.beta1, run.beta2),
        eps=run.adam_eps,
        weight_decay=run.weight_decay,
        fused=True,
    )


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients to a total norm of at most `largest` and return the norm before, a 0-d tensor.

    They are left as they are where `largest` is 0 or the norm is not finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if largest > 0 and norm.isfinite():
        nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


class AveragedWeights:
    """Exponential moving average of a model's parameters: a += (1 - decay) (w - a), unbiased in its first
    steps.

    The decay of step n (1-based) is min(decay, n / (n + 10)), so that early averages are not held by the
    initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = list(model.parameters())
        self.values = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one step."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call twice to evaluate in between."""
        for live, average in zip(self._live, self.values, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)
