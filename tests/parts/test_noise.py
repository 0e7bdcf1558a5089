"""Noise on routers: where it goes, and the loads that it makes smooth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.errors import UserError
from gatewright.parts import Assignment, MoELayer, Router, RoutingCall
from gatewright.parts.draws import centred, fold, normal
from gatewright.parts.noise import (
    INPUT_NOISE,
    LOGIT_NOISE,
    InputJitter,
    LogitNoise,
    SoftplusNoise,
    gate_totals,
    load_estimate,
)
from gatewright.parts.rules import TokenChoice
from tests.oracle import noise as oracle
from tests.parts.every import layer_of, losses, tokens
from tests.parts.harness import repeatable
from tests.parts.rules.noisy_cases import CPU, twin

KEY = torch.tensor(5)
TRAINING = RoutingCall(training=True, key=KEY)


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_jitter_multiplies_every_element_by_its_own_factor():
    x = torch.full((400, 50), 2.0)
    seen = InputJitter(0.1).on_input(x, TRAINING)
    u = centred(fold(KEY, INPUT_NOISE), (400, 50), CPU)
    # A factor 1 + eps u: .9 at u = -1, 1.1 at u = 1.
    torch.testing.assert_close(seen, 2 * (1 + 0.1 * u))
    assert seen.min() >= 1.8
    assert seen.max() <= 2.2
    assert abs(seen.mean() - 2) < 2 * 4 * 0.1 / math.sqrt(3 * x.numel())


def test_jitter_of_bf16_tokens_is_not_rounded_to_bf16():
    x = torch.ones(1000, 4, dtype=torch.bfloat16)
    seen = InputJitter(1e-2).on_input(x, TRAINING)
    assert seen.dtype == torch.float32
    # Around 1, bf16 holds 5 numbers between .99 and 1.01.
    assert seen.unique().numel() > 3000


def test_the_experts_see_tokens_without_jitter():
    # One expert: its weight is 1 whatever the router sees, so that nothing in y may move.
    torch.manual_seed(0)
    router = Router(6, 1, rule=TokenChoice(1, "raw"), noise=InputJitter(0.5))
    layer = MoELayer(6, 1, 1, 4, router=router)
    x = torch.randn(5, 6)
    before, (y, stats), (quiet, _) = x.clone(), layer(x, capture=True, key=KEY), layer.eval()(x)
    assert torch.equal(y, quiet)
    assert torch.equal(x, before)
    assert not torch.allclose(stats["router"].logits, router(x))


def test_logit_noise_has_a_standard_deviation_of_1_over_e():
    clean = torch.zeros(2000, 8)
    noisy, std = LogitNoise().on_logits(clean, clean, TRAINING)
    assert std == 1 / 8
    assert torch.equal(noisy, normal(fold(KEY, LOGIT_NOISE), (2000, 8), CPU) / 8)
    noisy, std = LogitNoise(0.5).on_logits(clean, clean, TRAINING)
    assert std == 0.5
    assert abs(noisy.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * clean.numel())


def test_softplus_noise_starts_at_ln_2_and_learns():
    noise = SoftplusNoise(3, 4)
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    noisy, std = noise.on_logits(x, torch.zeros(1000, 4), TRAINING)
    torch.testing.assert_close(std, torch.full((1000, 4), math.log(2)))
    assert abs(noisy.std() - math.log(2)) < 4 * math.log(2) / math.sqrt(8000)
    noisy.square().sum().backward()
    assert noise.weight.grad is not None
    assert noise.weight.grad.any()
    _, std = SoftplusNoise(3, 4, epsilon=0.01).on_logits(x, torch.zeros(1000, 4), TRAINING)
    torch.testing.assert_close(std, torch.full((1000, 4), math.log(2) + 0.01))


def test_load_of_2017_by_hand():
    clean, noisy, std = table([1, 0, -1]), table([0.5, 0.8, -2]), table([1, 2, 0.5])
    # K = 1, the best other: .8, .5, .8. z = (1 - .8) / 1 = .2; (0 - .5) / 2 = -.25; (-1 - .8) / .5 = -3.6.
    one = load_estimate(clean, noisy, std, 1)
    torch.testing.assert_close(one, table([0.57926, 0.40129, 0.00016]), rtol=0, atol=5e-6)
    # K = 2, the second best other: -2, -2, .5. z = 3 / 1 = 3; 2 / 2 = 1; (-1 - .5) / .5 = -3.
    two = load_estimate(clean, noisy, std, 2)
    torch.testing.assert_close(two, table([0.99865, 0.84134, 0.00135]), rtol=0, atol=5e-6)


def test_load_of_vmoe_by_hand():
    # The highest of all, e itself included, is .7: z = (1 - .7) / .5 = .6; (0 - .7) / .5 = -1.4.
    load = load_estimate(table([1, 0]), table([0.6, 0.7]), 0.5, 1, excluding=False)
    torch.testing.assert_close(load, table([0.72575, 0.08076]), rtol=0, atol=5e-6)


def test_as_many_chosen_as_experts_are_true_counts_without_gradient():
    clean = table([3, -2, 0], [0, 0, 9]).requires_grad_()
    for excluding in (True, False):
        load = load_estimate(clean, clean + 1, 0.1, 3, excluding)
        assert torch.equal(load, torch.ones(2, 3, dtype=torch.float64))
        assert not load.requires_grad


@pytest.mark.parametrize("num_selected", [1, 2, 3])
def test_the_load_is_how_often_an_expert_wins_under_new_noise_of_its_own(num_selected: int):
    source = torch.Generator().manual_seed(num_selected)
    clean, std = (torch.randn(1, 4, generator=source, dtype=torch.float64) for _ in range(2))
    std = std.abs() + 0.3
    noisy = clean + std * torch.randn(1, 4, generator=source, dtype=torch.float64)
    chances = load_estimate(clean, noisy, std, num_selected)
    draws = 40_000
    for e in range(4):
        trials = noisy.expand(draws, 4).clone()
        trials[:, e] = clean[0, e] + std[0, e] * torch.randn(draws, generator=source, dtype=torch.float64)
        wins = (trials.argsort(dim=1, descending=True)[:, :num_selected] == e).any(dim=1).double().mean()
        chance = chances[0, e]
        assert abs(wins - chance) < 4 * (chance * (1 - chance) / draws).sqrt() + 1e-4


@repeatable(250)
@given(
    num_tokens=st.integers(0, 4),
    num_experts=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    excluding=st.booleans(),
    told=st.booleans(),
    data=st.data(),
)
def test_load_equals_the_oracle(num_tokens, num_experts, seed, excluding, told, data):
    num_selected = data.draw(st.integers(1, num_experts))
    source = torch.Generator().manual_seed(seed)
    clean, noisy, std = (
        torch.randn(num_tokens, num_experts, generator=source, dtype=torch.float64) for _ in range(3)
    )
    std = std.abs() + 0.05
    ours, theirs = ([twin(clean), twin(noisy), twin(std)] for _ in range(2))
    chosen = None
    if told:
        chosen = noisy.argsort(dim=1, descending=True)[:, :num_selected]
    found = load_estimate(*ours, num_selected, excluding, chosen)
    rows = [oracle.load(*map(list, row), num_selected, excluding) for row in zip(*theirs, strict=True)]
    factors = torch.randn(num_tokens, num_experts, generator=source, dtype=torch.float64)
    mine = (found * factors).sum() + sum(0 * leaf.sum() for leaf in ours)
    other = sum((0 * leaf.sum() for leaf in theirs), torch.zeros((), dtype=torch.float64))
    for t, row in enumerate(rows):
        torch.testing.assert_close(found[t], torch.stack(row), rtol=1e-12, atol=1e-12)
        other = other + (torch.stack(row) * factors[t]).sum()
    for one, two in zip(torch.autograd.grad(mine, ours), torch.autograd.grad(other, theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_vanishing_noise_makes_a_step_with_a_finite_gradient():
    clean = table([1, 0, -1]).requires_grad_()
    std = table([0, 1e-30, 1e-9]).requires_grad_()
    load = load_estimate(clean, clean.detach(), std, 1)
    assert load.tolist() == [[1, 0, 0]]
    load.sum().backward()
    for gradient in (clean.grad, std.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
    # Equal logits: half, and the least standard deviation holds: d Phi / d clean = 1 / (1e-6 sqrt(2 pi)).
    even = table([0, 0]).requires_grad_()
    load = load_estimate(even, table([0, 0]), 1e-9, 1)
    assert load.tolist() == [[0.5, 0.5]]
    load.sum().backward()
    torch.testing.assert_close(even.grad, table([398942.28, 398942.28]))


def test_importance_sums_the_sparse_gates():
    experts = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    weights = table([0.75, 0.25], [0.5, math.nan], [math.nan, math.nan])
    assert gate_totals(Assignment(experts, weights, 4)).tolist() == [0.75, 0, 0.75, 0]


@pytest.mark.parametrize("noise", [LogitNoise(), SoftplusNoise(5, 4)], ids=["fixed", "learned"])
def test_padding_enters_no_sum(noise: LogitNoise | SoftplusNoise):
    torch.manual_seed(0)
    layer = MoELayer(5, 4, 2, 3, router=Router(5, 4, rule=TokenChoice(2), noise=noise))
    x = torch.randn(6, 5)
    mask = torch.tensor([True, True, True, True, False, False])
    # The first four tokens' noise is the same, since an element's depends on its place alone.
    _, alone = layer(x[:4], key=KEY)
    _, padded = layer(torch.where(mask.unsqueeze(-1), x, math.nan), mask, key=KEY)
    for name in ("importance", "load"):
        torch.testing.assert_close(padded["router"].sums[name], alone["router"].sums[name])
    assert not layer.eval()(x)[1]["router"].sums


@pytest.mark.parametrize("name", ["noisy_top_k", "vmoe", "switch", "sampled", "hierarchical"])
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_recomputation_repeats_the_noise_to_the_bit(name: str, key: Tensor | None):
    from gatewright.parts.rules.registry import router_info

    info, gradients = router_info(name), []
    for recompute in (False, True):
        layer = layer_of(info)
        x, _ = tokens(24)
        x.requires_grad_()

        def run(x: Tensor, layer: MoELayer = layer) -> tuple[Tensor, Tensor]:
            y, stats = layer(x, key=key)
            return y, losses(stats)

        torch.manual_seed(3)
        y, loss = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        torch.rand(5)  # what is drawn meanwhile is put back too
        (y.square().sum() + loss).backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, again)


def test_impossible_noise_is_refused():
    for eps in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match=r"eps .*; allowed: above 0, below 1; the papers' is 0.01"):
            InputJitter(eps)
    for std in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"std .*; allowed: above 0"):
            LogitNoise(std)
    with pytest.raises(UserError, match=r"width 0, num_experts 4, epsilon 0.0; allowed: sizes of 1"):
        SoftplusNoise(0, 4)
    with pytest.raises(UserError, match=r"epsilon -0.1; allowed"):
        SoftplusNoise(3, 4, -0.1)
