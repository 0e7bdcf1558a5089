"""Noisy top-K gating of 2017: learned noise, the K highest noisy logits, and a softmax over those alone."""

from __future__ import annotations

import torch
from torch import nn

from gatewright.parts.noise import SoftplusNoise
from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


class NoisyTopKRouter(Router):
    """Token choice among noisy logits, weighted by a softmax over the chosen.

    Equation: Shazeer et al. 2017 eq 3-5: G(x) = softmax(KeepTopK(H(x), K)), H(x) = x W_g + n *
    softplus(x W_noise), n ~ Normal(0, 1) in training only. sums["importance"] (eq 6) and sums["load"]
    (eq 8-10) are what `importance_loss` and `load_loss` take; there are none in evaluation.
    Args: `zero_init` starts W_g at 0 as the paper does (W_noise always does): routing is then uniform at
    random. In evaluation every logit is then equal, and all tokens go to experts 0 to K - 1 until W_g has
    learned. `epsilon` is added to the noise's standard deviation (T2T: 1e-2; the paper: 0).
    Raises: UserError for K outside 1..E, and for K = 1 < E (a constant gate).
    Differs: none in the router; the paper has no capacity and drops no token.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_selected: int,
        dtype: torch.dtype = torch.float32,
        *,
        zero_init: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        check_selection(num_experts, num_selected, "softmax_selected")
        self.zero_init = zero_init
        rule = TokenChoice(num_selected, "softmax_selected")
        super().__init__(
            width, num_experts, dtype, rule=rule, noise=SoftplusNoise(width, num_experts, epsilon)
        )
        self.keeps_initialisation = zero_init

    def reset_parameters(self, std: float | None = None) -> None:
        """Set W_g to 0; without `zero_init`, or with an `std`, draw it as any router's. W_noise is 0."""
        super().reset_parameters(std)
        if self.zero_init and std is None:
            nn.init.zeros_(self.weight)
        if isinstance(self.noise, SoftplusNoise):
            self.noise.reset_parameters()


register(
    RouterInfo(
        name="noisy_top_k",
        scores="softmax of noisy logits, their spread learned",
        selection="each token its K best experts",
        weights="softmax over the chosen",
        capacity="none",
        losses=("importance", "load"),
        causal=True,
        used_by="Sparsely-Gated MoE (2017)",
        source="Shazeer et al. 2017 eq 3-10",
        make=NoisyTopKRouter,
    )
)
