"""Switch: one expert per token, weighted by its score, and jitter on what the router sees."""

from __future__ import annotations

import torch

from gatewright.parts.noise import InputJitter
from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


def make_switch(
    width: int,
    num_experts: int,
    num_selected: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    eps: float | None = 1e-2,
) -> Router:
    """Return Switch's router: the best expert of p = softmax(W x), weighted by p itself.

    Equation: Switch Transformer eq 1-2 with K = 1; x * U(1 - eps, 1 + eps) in training (appendix C). The
    weight is never renormalised: over one expert it would be 1, and teach the router nothing.
    Args: `eps` of the jitter (ST-MoE table 3: 0.01), None routes without.
    Raises: UserError for other K, and for an `eps` outside (0, 1).
    Differs: has no capacity of its own; the papers' is the layer's, Capacity(1.25, per_token=True).
    """
    check_selection(num_experts, num_selected, "raw")
    return Router(
        width,
        num_experts,
        dtype,
        rule=TokenChoice(num_selected, "raw"),
        noise=None if eps is None else InputJitter(eps),
    )


register(
    RouterInfo(
        name="switch",
        scores="softmax, input jittered by 1 %",
        selection="each token its best expert",
        weights="raw score",
        capacity="none (the papers: 1.0 to 2.0 in the layer)",
        losses=("balance",),
        causal=True,
        used_by="Switch Transformer",
        source="Switch Transformer eq 1-2, appendix C",
        make=make_switch,
        fixed_selected=1,
    )
)
