"""The toolkit's noisy routers, and ReMoE, as functions of logits and of the noise that they are handed."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gatewright.parts import RoutingCall
from gatewright.parts.router import Routed, Router
from gatewright.parts.rules.hierarchical import HierarchicalRouter
from gatewright.parts.rules.noisy_top_k import NoisyTopKRouter
from gatewright.parts.rules.relu import ReLURouting
from gatewright.parts.rules.threshold_second import ThresholdSecond

Found = tuple[Tensor, Tensor, dict[str, Tensor]]
KEY = torch.tensor(5)


def _routed(
    router: Router, parts: list[tuple[Any, Tensor]], noise: list[Tensor], mask: Tensor | None
) -> Routed:
    """Route tokens that hold their logits: each weight of `parts` picks its own columns of x."""
    widths = [values.shape[1] for _, values in parts]
    x = torch.cat([values for _, values in parts], dim=1)
    with torch.no_grad():
        for i, (weight, values) in enumerate(parts):
            weight.zero_()
            begin = sum(widths[:i])
            weight[:, begin : begin + widths[i]] = torch.eye(values.shape[1])
    given = {tuple(values.shape): values for values in noise}
    with mock.patch("gatewright.parts.noise.normal", side_effect=lambda key, shape, *_: given[shape].clone()):
        return router.route(x, RoutingCall(training=True, mask=mask, key=KEY))


def noisy_top_k(
    logits: Tensor, k: int, noise: Tensor, noise_logits: Tensor, mask: Tensor | None = None
) -> Found:
    router = NoisyTopKRouter(2 * logits.shape[1], logits.shape[1], k)
    parts = [(router.weight, logits), (router.noise.weight, noise_logits)]
    found = _routed(router, parts, [noise], mask).assignment
    return found.experts, found.weights, dict(found.sums)


def hierarchical(
    logits: Tensor,
    k: int,
    noise: Tensor,
    noise_logits: Tensor,
    primary: Tensor,
    primary_noise: Tensor,
    primary_noise_logits: Tensor,
    num_primary: int,
    mask: Tensor | None = None,
) -> Found:
    groups, experts = primary.shape[1], logits.shape[1]
    router = HierarchicalRouter(
        2 * (experts + groups), experts, k, num_groups=groups, num_primary=num_primary
    )
    parts = [(router.weight, logits), (router.noise.weight, noise_logits)]
    parts += [(router.primary, primary), (router.primary_noise.weight, primary_noise_logits)]
    found = _routed(router, parts, [noise, primary_noise], mask).assignment
    return found.experts, found.weights, dict(found.sums)


def st_moe(
    logits: Tensor, k: int, later_coins: Tensor, threshold: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    flip = "gatewright.parts.rules.threshold_second.later_choice_coins"
    with mock.patch(flip, return_value=later_coins):
        rule = ThresholdSecond(k, threshold)
        found = rule(logits, logits.softmax(dim=1), RoutingCall(training=True, mask=mask))
    return found.experts, found.weights


def remoe(logits: Tensor, k: int, penalty: float, alpha: float, mask: Tensor | None = None) -> Found:
    rule = ReLURouting(logits.shape[1], k, alpha, penalty)
    rule.penalty = torch.tensor(penalty, dtype=torch.float64)
    found = rule(logits, logits.relu(), RoutingCall(training=True, mask=mask))
    tokens = logits.shape[0] if mask is None else int(mask.sum())
    counts = torch.bincount(found.experts[found.experts >= 0], minlength=logits.shape[1])
    loss = found.sums["relu_penalty"] / max(tokens, 1)
    after = copy.deepcopy(rule)
    after.update(counts, tokens)
    return found.experts, found.weights, {"penalty_loss": loss, "next_penalty": after.penalty}


NOISY = {"noisy_top_k": noisy_top_k, "hierarchical": hierarchical, "st_moe": st_moe, "remoe": remoe}
