"""Next-token prediction: the cross-entropy by hand, and what the total is made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer, Stats, balance_loss, z_loss
from gatewright.parts.losses import LOSSES


def output_of(logits: Tensor, stats: Stats | None = None) -> SimpleNamespace:
    """Return what a language model returns."""
    return SimpleNamespace(logits=logits, stats=Stats() if stats is None else stats)


def routed() -> tuple[MoELayer, Stats]:
    """Return a layer and two routers' Stats that come from it."""
    torch.manual_seed(0)
    layer = MoELayer(5, 4, 2, 3)
    stats = layer(torch.randn(7, 5))[1].under("layers.0") | layer(torch.randn(7, 5))[1].under("layers.1")
    return layer, stats


def test_the_task_is_the_mean_cross_entropy_in_nats():
    # Probabilities 1/2, 1/4, 1/4 and 1/8, 5/8, 2/8; the targets 0 and 2 cost ln 2 and ln 4.
    logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 5.0, 2.0]]]).log()
    loss = NextToken()(output_of(logits), torch.tensor([[0, 2]]))
    assert loss.task.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert torch.equal(loss.total, loss.task)
    assert loss.balance.item() == loss.z.item() == 0


def test_the_total_is_the_task_plus_the_weighted_losses():
    layer, stats = routed()
    logits = torch.randn(2, 3, 6, requires_grad=True)
    loss = NextToken(0.5, 0.25)(output_of(logits, stats), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.balance.item() == balance_loss(stats).item()
    assert loss.z.item() == z_loss(stats).item()
    assert loss.total.item() == pytest.approx(
        loss.task.item() + 0.5 * balance_loss(stats).item() + 0.25 * z_loss(stats).item()
    )
    (found,) = torch.autograd.grad(loss.total, layer.router.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(0.5 * balance_loss(stats) + 0.25 * z_loss(stats), layer.router.weight)
    torch.testing.assert_close(found, expected)
    assert not loss.balance.requires_grad
    assert not loss.z.requires_grad


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
def test_cross_entropy_is_taken_in_fp32(dtype: torch.dtype, expected: torch.dtype):
    # 64 equal logits: ln 64 = 4.158883; bf16 would give 4.15625.
    loss = NextToken()(output_of(torch.ones(1, 1, 64, dtype=dtype)), torch.zeros(1, 1, dtype=torch.int64))
    assert loss.task.dtype == expected
    assert loss.task.item() == pytest.approx(math.log(64), abs=1e-5)


def test_fp64_stays_fp64():
    logits = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64)
    loss = NextToken()(output_of(logits), torch.zeros(1, 1, dtype=torch.int64))
    assert loss.task.item() == pytest.approx(math.log(4 / 3), abs=1e-15)


@pytest.mark.parametrize("weights", [(-0.1, 0.0), (0.0, -1.0), (math.nan, 0.0)])
def test_negative_weights_are_refused(weights: tuple[float, float]):
    with pytest.raises(UserError, match=r"balance_weight .*, z_weight .*; allowed: 0 or more"):
        NextToken(*weights)


def test_named_losses_join_the_total():
    _, stats = routed()
    logits, targets = torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.int64)
    bare = NextToken()(output_of(logits, stats), targets)
    own = NextToken(0.5, losses={"z": 0.25, "importance": 2.0})(output_of(logits, stats), targets)
    expected = 0.5 * balance_loss(stats) + 0.25 * z_loss(stats) + 2.0 * LOSSES["importance"](stats)
    assert own.total.item() == pytest.approx(bare.task.item() + expected.item())
    assert own.task.item() == bare.task.item()


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_the_balance_loss_has_the_scope_that_was_asked_for(scope: str):
    _, stats = routed()
    logits, targets = torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.int64)
    # Counts of a larger batch, all to expert 0: no other scope may look at them.
    counts = {name: torch.tensor([9, 0, 0, 0]) for name in stats}
    found = NextToken(1.0, scope=scope)(output_of(logits, stats), targets, counts)
    expected = balance_loss(stats, scope, counts if scope == "global_batch" else None)
    assert found.balance.item() == expected.item()
    assert found.total.item() == pytest.approx(found.task.item() + expected.item())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"losses": {"balence": 0.1}}, "loss 'balence' is unknown; did you mean 'balance'"),
        ({"losses": {"z": -1.0}}, "losses z -1.0; allowed: 0 or more"),
        ({"scope": "globl_batch"}, "scope 'globl_batch' is unknown; did you mean 'global_batch'"),
    ],
)
def test_an_unknown_loss_or_scope_is_named(options: dict, line: str):
    with pytest.raises(UserError, match=line):
        NextToken(**options)
