"""gatewright.testing's noisy routers and ReMoE: mistakes of choice, weights, sums and gradients are named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.parts.noise import load_estimate
from gatewright.parts.routing import select_top
from gatewright.testing import Mismatch, check_router
from tests.noisy_routers import noisy_top_k, remoe, st_moe


def is_named(fn: Callable[..., Any], rule: str, told: str, dtype: torch.dtype = torch.float64) -> None:
    found = check_router(fn, rule, report=True, dtype=dtype)
    assert not found.ok
    assert any(told in line for line in found.diagnosis), str(found)
    with pytest.raises(Mismatch):
        check_router(fn, rule, dtype=dtype)


def gate(logits: Tensor, k: int, noise: Tensor, noise_logits: Tensor, wrong: str = "") -> Any:
    """2017's gate as it is often written, and what can be wrong with it."""
    std = noise_logits if wrong == "spread" else F.softplus(noise_logits)
    noisy = logits if wrong == "deaf" else logits + noise * std
    ids = select_top(noisy, k)
    weights = torch.softmax((logits if wrong == "clean" else noisy).gather(1, ids), dim=1)
    if wrong == "full":
        weights = noisy.softmax(dim=1).gather(1, ids)
    gates = torch.zeros_like(logits).scatter(1, ids, weights)
    start = noisy if wrong == "start" else logits.detach() if wrong == "detached" else logits
    load = load_estimate(start, noisy, std, k, excluding=wrong != "own", chosen=ids)
    if wrong == "counts":
        load = (gates > 0).to(logits.dtype)
    importance = noisy.softmax(dim=1) if wrong == "dense" else gates
    return ids, weights, {"importance": importance.sum(dim=0), "load": load.sum(dim=0)}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("deaf", "the noise is not used"),
        ("spread", "without softplus"),
        ("clean", "weights come from logits without noise"),
        ("full", "weights are a softmax over all experts"),
        ("dense", "importance sums the softmax over all experts"),
        ("own", "load compares with the K-th highest of all"),
        ("start", "load starts from noisy logits"),
        ("counts", "load counts tokens"),
        ("detached", "all sums have their values: a gradient"),
    ],
)
def test_what_is_wrong_with_a_noisy_gate_is_named(wrong: str, told: str):
    assert check_router(gate, "noisy_top_k").ok
    is_named(partial(gate, wrong=wrong), "noisy_top_k", told)


def test_sums_are_held_only_where_they_are_returned():
    def some(*given: Any, names: tuple[str, ...], **more: Any) -> Any:
        experts, weights, sums = noisy_top_k(*given, **more)
        return experts, weights, {name: sums[name] for name in names}

    counts = [
        check_router(partial(some, names=names), "noisy_top_k").cases
        for names in ((), ("load",), ("load", "importance"))
    ]
    assert counts[0] < counts[1] == counts[2]

    def odd(logits: Tensor, k: int, *, named: str, **more: Any) -> Any:
        return *gate(logits, k, **more)[:2], {named: logits.sum()}

    with pytest.raises(Mismatch, match="a sum named 'loads'; expected some of importance, load"):
        check_router(partial(odd, named="loads"), "noisy_top_k")
    with pytest.raises(Mismatch, match="sums: load has 1 numbers; expected 4"):
        check_router(partial(odd, named="load"), "noisy_top_k")


def two_levels(logits: Tensor, k: int, num_primary: int, wrong: str = "", **given: Tensor) -> Any:
    """Hierarchical gating, place by place, and what can be wrong with it."""
    spread, stds = F.softplus(given["primary_noise_logits"]), F.softplus(given["noise_logits"])
    first = given["primary"] + (0 if wrong == "deaf" else given["primary_noise"] * spread)
    tokens, num_groups = first.shape
    size = logits.shape[1] // num_groups
    clean, noisy, stds = (
        values.view(tokens, num_groups, size) for values in (logits, logits + given["noise"] * stds, stds)
    )
    if wrong == "flat":
        every = (first.softmax(dim=1).unsqueeze(2) * noisy.softmax(dim=2)).flatten(1)
        ids = select_top(every, k)
        return ids, every.gather(1, ids) / every.gather(1, ids).sum(dim=1, keepdim=True)
    groups = select_top(first, num_primary)
    of_groups = first.gather(1, groups).softmax(dim=1)
    experts, weights = [], []
    load = torch.zeros(num_groups, size, dtype=logits.dtype)
    for place in range(num_primary):
        where = torch.arange(tokens), groups[:, place]
        best = select_top(noisy[where], k // num_primary)
        level = 1 / num_primary if wrong == "alone" else of_groups[:, place : place + 1]
        experts.append(groups[:, place : place + 1] * size + best)
        weights.append(level * noisy[where].gather(1, best).softmax(dim=1))
        chance = load_estimate(clean[where], noisy[where], stds[where], k // num_primary)
        load = load.index_add(0, groups[:, place], chance)
    found = torch.cat(experts, dim=1), torch.cat(weights, dim=1)
    return (*found, {"load": load.flatten()}) if wrong == "one load" else found


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("flat", "the K best products of all experts"),
        ("alone", "the groups' weights are not used"),
        ("deaf", "the groups are chosen without noise"),
        ("one load", "load is that of the second level alone"),
    ],
)
def test_what_is_wrong_with_two_levels_is_named(wrong: str, told: str):
    assert check_router(two_levels, "hierarchical").ok
    is_named(partial(two_levels, wrong=wrong), "hierarchical", told)


def later(logits: Tensor, k: int, later_coins: Tensor, threshold: float, wrong: str = "") -> Any:
    """ST-MoE's rule, and what can be wrong with it."""
    scores = logits.softmax(dim=1)
    ids = select_top(scores, k)
    raw = scores.gather(1, ids)
    shares = raw / raw.sum(dim=1, keepdim=True)
    chance = (raw if wrong == "raw coin" else shares)[:, 1:] / threshold
    used = {"sure": chance > 0, "cut": chance >= 1}.get(wrong, later_coins < chance)
    used = torch.cat([torch.ones_like(used[:, :1]), used], dim=1)
    weights = torch.where(used, raw if wrong in ("raw", "after") else shares, 0)
    if wrong == "after":
        weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.where(used, ids, -1), weights


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("raw coin", "coins are held to raw scores"),
        ("sure", "no coin is used: every choice is"),
        ("cut", "no coin is used: a choice is if its share reaches the threshold"),
        ("raw", "weights are raw scores"),
        ("after", "shares are taken after choices are left out"),
    ],
)
def test_what_is_wrong_with_a_coin_is_named(wrong: str, told: str):
    assert check_router(later, "st_moe").ok
    is_named(partial(later, wrong=wrong), "st_moe", told)


def test_a_threshold_may_be_fixed():
    def at_half(logits: Tensor, k: int, later_coins: Tensor) -> Any:
        return st_moe(logits, k, later_coins, 0.5)

    assert check_router(at_half, "st_moe", threshold=0.5).ok
    with pytest.raises(Mismatch):
        check_router(at_half, "st_moe", threshold=0.2)


def relu(logits: Tensor, k: int, penalty: float, alpha: float, wrong: str = "") -> Any:
    """ReMoE with every expert named: a weight of 0 is an empty place."""
    scores = logits.relu()
    num_tokens, num_experts = logits.shape
    used = scores > 0
    share = {"K": num_experts, "E": 1}.get(wrong, num_experts / k) * used.sum(dim=0) / max(num_tokens, 1)
    share = torch.ones_like(share) if wrong == "plain" else share
    loss = penalty * (share * scores).sum() / max(num_tokens, 1)
    sign = torch.sign(used.sum() - k * num_tokens).item()
    after = torch.tensor(penalty * alpha ** (-sign if wrong == "turned" else sign))
    if wrong == "limited":
        kept = select_top(scores, k)
        scores = torch.zeros_like(scores).scatter(1, kept, scores.gather(1, kept))
    if wrong == "shares":
        scores = scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-9)
    sums = {"penalty_loss": loss.detach() if wrong == "detached" else loss, "next_penalty": after}
    return torch.arange(num_experts).expand_as(scores), scores, sums


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("limited", "at most K experts are used"),
        ("shares", "weights are renormalised over the chosen"),
        ("K", "f lacks the factor 1 / K"),
        ("E", "f lacks the factor E / K"),
        ("plain", "the penalty is the plain L1 norm"),
        ("turned", "the penalty moves the wrong way"),
        ("detached", "all sums have their values: a gradient"),
    ],
)
def test_what_is_wrong_with_remoe_is_named(wrong: str, told: str):
    assert check_router(relu, "remoe", dtype=torch.float32).ok
    is_named(partial(relu, wrong=wrong), "remoe", told, torch.float32)


@pytest.mark.parametrize("rule", [remoe, noisy_top_k])
def test_padding_that_is_counted_in_sums_is_found(rule: Callable[..., Any]):
    def counted(logits: Tensor, k: int, mask: Tensor | None = None, **given: Any) -> Any:
        ids, weights, _ = rule(logits, k, mask=mask, **given)
        return ids, weights, rule(logits, k, **given)[2]

    assert check_router(counted, rule.__name__).ok
    found = check_router(counted, rule.__name__, padding=True, report=True)
    assert found.differences
    assert all("with padding, sums" in difference.case for difference in found.differences)
