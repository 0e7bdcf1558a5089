"""Losses made of sums that single rules keep: numbers worked by hand, and what happens without the sums."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gatewright.errors import UserError
from gatewright.parts import Stats
from gatewright.parts.losses import LOSSES
from gatewright.parts.rule_losses import cosine_loss, depth_loss, entropy_loss, relu_loss, threshold_loss
from gatewright.parts.rules import registry
from tests.parts.seen import stats_of, with_sums


def total(value: float) -> torch.Tensor:
    """Return a 0-d sum with gradient."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_the_entropy_loss_is_the_mean_of_the_tokens_entropies():
    # Top-p example: P1 = (.7, .2, .08, .02), P2 = (.3, .28, .22, .2); H = .8519 and 1.3726, mean 1.1122.
    rows = [[0.7, 0.2, 0.08, 0.02], [0.3, 0.28, 0.22, 0.2]]
    h = sum(-p * math.log(p) for row in rows for p in row)
    stats = with_sums(stats_of([[0.0] * 4] * 2), entropy=total(h))
    assert entropy_loss(stats).item() == pytest.approx((0.8519 + 1.3726) / 2, abs=1e-4)


def test_the_threshold_loss_is_eq_20_per_token():
    # m = 1, thresholds T = (.5, .5), scores (.9, .1), (.6, .4): the batch gives expert 0 to token 0, expert 1
    # to token 1 (.4); the thresholds give expert 0 to both, expert 1 to none. Differences: (1, 0) on .6 and
    # (0, 1) on .4: (1 - 0)(.6 - .5) + (0 - 1)(.4 - .5) = .2; over T = 2 tokens .1.
    scores, limits = [[0.9, 0.1], [0.6, 0.4]], [0.5, 0.5]
    batch = [[1, 0], [0, 1]]
    eq_20 = sum(
        ((scores[t][e] > limits[e]) - batch[t][e]) * (scores[t][e] - limits[e])
        for t in range(2)
        for e in range(2)
    )
    assert eq_20 == pytest.approx(0.2)
    stats = with_sums(stats_of([[0.0, 0.0]] * 2), threshold=total(eq_20))
    assert threshold_loss(stats).item() == pytest.approx(0.1, abs=1e-15)


def test_the_depth_loss_is_a_mean_cross_entropy():
    # r = .2, -.5, 1, .1 with targets 1, 0, 1, 0: (.598 + .474 + .313 + .744) / 4 = .5325.
    outputs, chosen = [0.2, -0.5, 1.0, 0.1], [1, 0, 1, 0]
    bce = sum(
        math.log1p(math.exp(-r)) if y else math.log1p(math.exp(r))
        for r, y in zip(outputs, chosen, strict=True)
    )
    stats = with_sums(stats_of([[0.0]] * 4), depth=total(bce))
    assert depth_loss(stats).item() == pytest.approx(0.5325, abs=5e-4)


def test_the_relu_loss_is_the_penalty_per_token():
    # ReMoE eq 10-11: E = 2, K = 1, T = 2, R = (1, 0), (.5, .25): tokens of e (2, 1), f = 2 / (1 * 2) times
    # that = (2, 1); sum f R = 2 * 1.5 + 1 * .25 = 3.25; lambda .1 and T = 2: .1625.
    gates = [[1.0, 0.0], [0.5, 0.25]]
    f = [2 / 2 * sum(row[e] > 0 for row in gates) for e in range(2)]
    assert f == [2, 1]
    penalty = 0.1 * sum(f[e] * row[e] for row in gates for e in range(2))
    stats = with_sums(stats_of([[0.0, 0.0]] * 2), relu_penalty=total(penalty))
    assert relu_loss(stats).item() == pytest.approx(0.1625, abs=1e-15)


def test_the_cosine_loss_by_hand():
    # E = 2, K = 1, T = 2, both to expert 0: f = (1, 0). Sharpened shares (.9, .1), (.6, .4): mean (.75, .25).
    # 2 * .75 = 1.5. With one token each: f = (1/2, 1/2), 2 * (.375 + .125) = 1.
    importance = torch.tensor([1.5, 0.5], dtype=torch.float64)
    both = with_sums(stats_of([[1.0, 0.0]] * 2), cosine_importance=importance)
    assert cosine_loss(both).item() == pytest.approx(1.5, abs=1e-15)
    even = with_sums(stats_of([[1.0, 0.0], [0.0, 1.0]]), cosine_importance=importance)
    assert cosine_loss(even).item() == pytest.approx(1, abs=1e-15)


KEPT = {
    "entropy": ("entropy", entropy_loss),
    "threshold": ("threshold", threshold_loss),
    "depth": ("depth", depth_loss),
    "relu": ("relu_penalty", relu_loss),
    "cosine": ("cosine_importance", cosine_loss),
}


@pytest.mark.parametrize("loss", KEPT)
def test_a_loss_without_its_sum_says_so(loss: str):
    name, function = KEPT[loss]
    with pytest.raises(UserError, match=f"loss '{loss}' needs the sum '{name}', which no router here keeps"):
        function(stats_of([[0.0, 0.0]]))
    assert function(Stats()).item() == 0


def test_the_message_names_routers_that_keep_the_sum(monkeypatch: pytest.MonkeyPatch):
    one = registry.router_info("token_choice")
    monkeypatch.setattr(
        registry, "all_routers", lambda: (replace(one, name="sure", losses=("z", "entropy")),)
    )
    with pytest.raises(UserError, match=r"allowed: a router that does: sure$"):
        entropy_loss(stats_of([[0.0, 0.0]]))


def test_every_loss_that_a_router_is_trained_with_has_a_function():
    for info in registry.all_routers():
        assert set(info.losses) <= set(LOSSES), info.name


@pytest.mark.parametrize("loss", ["entropy", "threshold", "depth", "relu"])
def test_routers_without_the_sum_are_left_out(loss: str):
    # One router keeps 6 over 2 tokens, the other nothing: 3, not 1.5. Its gradient is 1 / T.
    name, function = KEPT[loss]
    kept = total(6.0)
    stats = with_sums(stats_of([[0.0, 0.0]] * 2), **{name: kept}).under("a")
    stats = stats | stats_of([[0.0, 0.0]]).under("b")
    value = function(stats)
    assert value.item() == pytest.approx(3)
    assert torch.autograd.grad(value, kept)[0].item() == pytest.approx(0.5)


def test_names_and_functions():
    assert [LOSSES[loss] for loss in KEPT] == [function for _, function in KEPT.values()]
