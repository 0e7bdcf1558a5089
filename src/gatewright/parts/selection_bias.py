"""Selection bias: one number per expert that decides who is chosen and never how much a choice weighs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean

BIAS_RULES = ("sign", "proportional")


class Float32State(nn.Module):
    """A module whose own floating-point buffers stay fp32, whatever dtype the model is cast to.

    `model.bfloat16()` and the like move such buffers to the model's device and leave their numbers alone: a
    bf16 bias of 1 would not feel a step of 0.001.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class SelectionBias(Float32State):
    """A bias per expert, added to scores where experts are chosen and nowhere else; it learns from loads,
    not from gradients.

    Equation: Loss-Free Balancing algorithm 1 and DeepSeek-V3 section 2.1.2: after each step e_i = mean(c) -
    c_i and b_i += u sign(e_i), with c_i the tokens of expert i in that step and b = 0 at first;
    "proportional" is their variant b_i += u e_i, the one for softmax scores.
    Args: `rate` u, 0 or more (both papers 0.001); it may be set later, 0 stops learning. `stop_after`:
    updates after which u counts as 0 (DeepSeek-V3: 0 for the last 500B of 14.8T tokens). `normalised`
    (proportional): e_i / mean(c) in place of e_i.
    Raises: UserError for an unknown rule, a rate below 0 or not finite, a negative stop_after, counts of
    another length.
    Differs: the proportional variant is printed with e_i in tokens, so its step grows with the batch: 1000
    tokens too few at u = 0.001 move a bias by 1, the whole range of a sigmoid. `normalised` takes that out.

    State: `bias` [E] fp32 and `updates` 0-d int64, persistent buffers; no parameter, so that no optimizer,
    weight decay or gradient reaches them.
    """

    bias: Tensor
    updates: Tensor

    def __init__(
        self,
        num_experts: int,
        rate: float = 1e-3,
        rule: str = "sign",
        *,
        normalised: bool = False,
        stop_after: int | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(
                f"num_experts {num_experts}; allowed: 1 or more; give the number of experts per layer"
            )
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"rate {rate}; allowed: 0 or more; 0.001 is usual, 0 keeps the bias as it is")
        if rule not in BIAS_RULES:
            raise UserError(
                f"rule {rule!r} is unknown{did_you_mean(rule, BIAS_RULES)}; allowed: {', '.join(BIAS_RULES)}"
            )
        if stop_after is not None and stop_after < 0:
            raise UserError(f"stop_after {stop_after}; allowed: 0 or more updates, or none to go on for ever")
        self.rate, self.rule, self.normalised, self.stop_after = rate, rule, normalised, stop_after
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def stopped(self) -> bool:
        """Whether updates no longer change the bias. Waits for the device."""
        return self.rate == 0 or (self.stop_after is not None and int(self.updates) >= self.stop_after)

    def forward(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return scores + bias, in at least fp32 and without gradient: to choose by, not to weigh by.

        Weights come from `scores` themselves; biased - bias would round small scores away.
        """
        return scores.detach() + self.bias

    @torch.no_grad()
    def update(self, counts: Int64[Tensor, "E"], tokens: int | Int64[Tensor, ""]) -> None:
        """Move the bias once, against the loads `counts` of one optimizer step, summed over its
        micro-batches and ranks; `tokens` they came from (the rule does not need it).
        """
        if counts.shape != self.bias.shape:
            raise UserError(
                f"counts of {tuple(counts.shape)} for a bias of {tuple(self.bias.shape)}; allowed: one load "
                "per expert"
            )
        counts = counts.to(self.bias.device)
        total = counts.sum()
        # E e_i, exact in int64: a mean in fp32 gives a balanced load of many tokens a sign.
        lack = total - counts.shape[0] * counts
        if self.rule == "sign":
            step = torch.sign(lack).to(torch.float32)
        else:
            step = lack.to(torch.float32) / (total.clamp(min=1) if self.normalised else counts.shape[0])
        step = self.rate * step
        if self.stop_after is not None:
            step = torch.where(self.updates < self.stop_after, step, 0)
        self.bias.add_(step)
        self.updates.add_(1)
