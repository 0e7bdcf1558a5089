"""V-MoE: noise of 1 / E on the logits, raw softmax weights, little room, given by rank or by priority."""

from __future__ import annotations

import torch

from gatewright.parts.capacity import Capacity
from gatewright.parts.noise import LogitNoise
from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


def make_vmoe(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    *,
    noise: bool = True,
    std: float | None = None,
    batch_priority: bool = False,
    factor: float = 1.05,
    eval_factor: float | None = None,
) -> Router:
    """Return V-MoE's router: token choice among softmax(W x + n), weights as they are.

    Equation: V-MoE (Riquelme et al. 2021): g = TOP_K(softmax(W x + n)), n ~ Normal(0, 1 / E^2) in training;
    capacity ceil(K T C / E) rounded up to a multiple of 4, first choices before second ones, or with
    `batch_priority` tokens in falling order of their best weight. sums["importance"] and sums["load"] are
    what its losses take, at weights 0.005 each.
    Args: `noise` False routes without; `std` of the noise, None is 1 / E; `factor` C, `eval_factor` in
    evaluation (None: the same; the paper's ImageNet settings take 4).
    Raises: UserError for K outside 1..E, a noise or a capacity that cannot be.
    """
    check_selection(num_experts, num_selected, "raw")
    return Router(
        width,
        num_experts,
        dtype,
        rule=TokenChoice(num_selected, "raw"),
        noise=LogitNoise(std) if noise else None,
        capacity=Capacity(
            factor, eval_factor, multiple=4, order="batch_priority" if batch_priority else "rank"
        ),
    )


register(
    RouterInfo(
        name="vmoe",
        scores="softmax of logits with noise of 1 / E",
        selection="each token its K best experts",
        weights="raw scores",
        capacity="1.05, rounded up to a multiple of 4; by rank, batch priority optional",
        losses=("importance", "load"),
        causal=False,
        used_by="V-MoE",
        source="V-MoE section 2 and its code",
        make=make_vmoe,
    )
)
