"""What never changes a loss: padding, orders, recomputation, ranks where its scope says so. And what does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.parts import MoELayer, Stats, balance_loss
from gatewright.parts.balancing import gshard_loss
from gatewright.parts.device_losses import device_loss
from gatewright.parts.losses import LOSSES
from tests.parts.seen import random_logits, stats_of

Loss = Callable[[Stats], Tensor]
COUNTS = {"router": torch.tensor([9, 2, 4, 0, 7, 2])}
ALL: dict[str, Loss] = {
    **{name: LOSSES[name] for name in ("balance", "sequence_balance", "gshard", "importance", "load", "z")},
    "device": lambda stats: device_loss(stats, 3),
    "global_batch": lambda stats: balance_loss(stats, "global_batch", COUNTS),
}
everywhere = pytest.mark.parametrize("name", ALL)


def equal(value: Tensor | float) -> object:
    """Return what equals a value up to the order of summation."""
    return pytest.approx(value.item() if isinstance(value, Tensor) else value, rel=1e-14)


@everywhere
def test_padding(name: str):
    # NaN in padded places, a sequence of padding only, and the same real tokens without any.
    logits = random_logits(3, 4, 6)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    filled = torch.where(mask.unsqueeze(-1), logits, math.nan).requires_grad_()
    padded = ALL[name](stats_of(filled, 2, mask=mask))
    bare = torch.stack([logits[0][mask[0]], logits[2][mask[2]]])
    assert padded.item() == equal(ALL[name](stats_of(bare, 2)))
    if padded.requires_grad:
        (grad,) = torch.autograd.grad(padded, filled)
        assert (grad[~mask] == 0).all()
        assert torch.isfinite(grad).all()


@everywhere
def test_the_order_of_experts(name: str):
    # Blocks of two experts, so that devices stay what they are; inside a block the order turns too.
    order = torch.tensor([5, 4, 0, 1, 3, 2])
    logits = random_logits(2, 5, 6)
    turned = stats_of(logits[..., order], 2)
    loss = ALL[name]
    if name == "global_batch":
        turned_counts = {"router": COUNTS["router"][order]}
        assert balance_loss(turned, "global_batch", turned_counts).item() == equal(loss(stats_of(logits, 2)))
    else:
        assert loss(turned).item() == equal(loss(stats_of(logits, 2)))


def test_an_order_that_moves_experts_between_devices_changes_the_device_loss():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    assert device_loss(stats_of(logits), 2).item() > 1.9
    assert device_loss(stats_of(logits[:, [0, 2, 1, 3]]), 2).item() == pytest.approx(1)


@everywhere
def test_the_order_of_tokens_in_a_sequence_and_of_sequences(name: str):
    logits = random_logits(3, 5, 6)
    turned = logits[[2, 0, 1]][:, [3, 1, 4, 0, 2]]
    assert ALL[name](stats_of(turned, 2)).item() == equal(ALL[name](stats_of(logits, 2)))


@everywhere
def test_recomputation(name: str):
    torch.manual_seed(0)
    layer = MoELayer(6, 6, 2, 5).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)

    def run(recompute: bool) -> tuple[Tensor, Tensor]:
        found = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y, stats = found
        loss = ALL[name](stats)
        (grad,) = torch.autograd.grad(y.square().sum() + 0.1 * loss, layer.router.weight)
        return loss, grad

    for plain, again in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", ["sequence_balance", "gshard"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_that_hold_whole_sequences(name: str, ranks: int):
    # Also accumulation: ranks are calls. Equal numbers of sequences, so that the mean of means is the mean.
    logits = random_logits(6, 5, 4).requires_grad_()
    whole = LOSSES[name](stats_of(logits, 2))
    parts = [LOSSES[name](stats_of(part, 2)) for part in logits.split(6 // ranks)]
    assert torch.stack(parts).mean().item() == equal(whole)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (whole, torch.stack(parts).mean())]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["sequence_balance", "gshard"])
def test_whole_routing_groups_count_as_sequences(name: str):
    logits = random_logits(8, 4)
    parts = [LOSSES[name](stats_of(part, 2, group_size=2)) for part in logits.split(4)]
    assert sum(parts).item() / 2 == equal(LOSSES[name](stats_of(logits, 2, group_size=2)))
    assert LOSSES[name](stats_of(logits.view(4, 2, 4), 2)).item() == equal(sum(parts) / 2)


@pytest.mark.parametrize("sizes", [[12], [6, 6], [4, 4, 4], [1] * 12, [7, 2, 3]])
def test_any_number_of_ranks_with_counts_handed_in(sizes: list[int]):
    # The mean over ranks, weighted by their tokens, is the one process's loss: value and gradient.
    logits = random_logits(12, 5).requires_grad_()
    whole = balance_loss(stats_of(logits, 2))
    local = [stats_of(part, 2) for part in logits.split(sizes)]
    counts = {"router": sum(stats["router"].counts for stats in local)}
    parts = [
        size / 12 * balance_loss(stats, "global_batch", counts)
        for size, stats in zip(sizes, local, strict=True)
    ]
    assert sum(parts).item() == equal(whole)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (whole, sum(parts))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_the_z_loss_is_a_plain_mean():
    logits = random_logits(12, 5)
    parts = [LOSSES["z"](stats_of(part)) * len(part) / 12 for part in logits.split([7, 2, 3])]
    assert sum(parts).item() == equal(LOSSES["z"](stats_of(logits)))


@pytest.mark.parametrize("name", ["balance", "importance", "load"])
def test_micro_batches_change_what_is_taken_over_them(name: str):
    # Half to expert 0, half to expert 1: even as one, 1 or more above that as two.
    logits = torch.tensor([[9.0, 0.0]] * 4 + [[0.0, 9.0]] * 4)
    whole = LOSSES[name](stats_of(logits)).item()
    halves = [LOSSES[name](stats_of(half)).item() for half in logits.split(4)]
    assert sum(halves) / 2 > whole + 0.99


def test_scopes_differ():
    # Sequences of one expert each: even as a micro-batch, uneven as sequences.
    x = torch.tensor([[[9.0, 0.0]] * 4, [[0.0, 9.0]] * 4])
    assert balance_loss(stats_of(x)).item() == pytest.approx(1)
    assert balance_loss(stats_of(x), "sequence").item() > 1.99
    assert gshard_loss(stats_of(x)).item() > 1.99


def test_of_one_sequence_and_one_choice_all_scopes_are_one():
    stats = stats_of(random_logits(9, 5))
    value = balance_loss(stats).item()
    assert balance_loss(stats, "sequence").item() == equal(value)
    assert gshard_loss(stats).item() == equal(value)
    handed = {"router": stats["router"].counts}
    assert balance_loss(stats, "global_batch", handed).item() == value


@everywhere
def test_layers_are_averaged(name: str):
    one, two = stats_of(random_logits(2, 5, 6), 2), stats_of(random_logits(2, 4, 6, seed=1), 2)
    if name == "global_batch":
        both = balance_loss(
            one.under("a") | two.under("b"),
            "global_batch",
            {f"{layer}.router": COUNTS["router"] for layer in "ab"},
        )
    else:
        both = ALL[name](one.under("a") | two.under("b"))
    assert both.item() == equal((ALL[name](one) + ALL[name](two)) / 2)
