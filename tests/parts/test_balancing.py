"""Balance losses: values worked by hand, conversions to other conventions, and the invariances claimed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewright.parts import MoELayer, Stats, attach_loss, balance_loss, z_loss
from tests.parts.harness import seen_layer
from tests.parts.seen import layers_of, random_logits, softmax, stats_of

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


@pytest.mark.parametrize("num_selected", [1, 2, 4])
@pytest.mark.parametrize("num_experts", [4, 8])
def test_the_balance_loss_is_one_when_balanced(num_selected: int, num_experts: int):
    # Token t prefers experts t, t + 1, ...: the E tokens choose each expert K times, with equal sums.
    row = torch.zeros(num_experts, dtype=torch.float64)
    row[:4] = torch.tensor([2.0, 1.5, 1.2, 1.0])
    logits = torch.stack([row.roll(t) for t in range(num_experts)])
    stats = stats_of(logits, num_selected)
    assert stats["router"].counts.tolist() == [num_selected] * num_experts
    assert balance_loss(stats).item() == pytest.approx(1, abs=1e-15)


def test_the_balance_loss_of_an_unbalanced_batch():
    # Switch eq 4-6, E = 2, T = 4. Scores 3/4, 1/4 three times and 1/4, 3/4 once:
    # f = (3/4, 1/4); P = ((3 * 3/4 + 1/4) / 4, ...) = (5/8, 3/8); E sum f P = 2 * (15/32 + 3/32) = 9/8.
    stats = stats_of([[LN3, 0.0]] * 3 + [[0.0, LN3]])
    assert balance_loss(stats).item() == pytest.approx(9 / 8, abs=1e-15)


def test_the_balance_loss_with_two_choices():
    # E = 3, K = 2, T = 2. exp = (4, 2, 1) and (4, 1, 2): counts (2, 1, 1), f = (1/2, 1/4, 1/4).
    # P = (4/7, 3/14, 3/14): 3 * (2/7 + 3/56 + 3/56) = 3 * 22/56 = 33/28.
    stats = stats_of([[LN4, LN2, 0.0], [LN4, 0.0, LN2]], 2)
    assert balance_loss(stats).item() == pytest.approx(33 / 28, abs=1e-15)


def test_all_tokens_to_one_sure_expert_cost_e():
    # f = (1, 0, 0, 0), P near (1, 0, 0, 0): the loss is near E, its largest value.
    assert balance_loss(stats_of([[40.0, 0.0, 0.0, 0.0]] * 5)).item() == pytest.approx(4, abs=1e-12)


def test_f_counts_before_capacity():
    # C = ceil(1 * 1 * 4 / 2) = 2 drops the third token that wants expert 0; the loss stays as above.
    stats = stats_of([[LN3, 0.0]] * 3 + [[0.0, LN3]], capacity_factor=1.0)
    assert stats["router"].kept.tolist() == [2, 1]
    assert balance_loss(stats).item() == pytest.approx(9 / 8, abs=1e-15)


def test_gradient_flows_through_the_scores_only():
    # d/d logits of E sum_e f_e P_e with f constant: E / T * p_e (f_e - sum_j f_j p_j).
    logits = random_logits(6, 4).requires_grad_()
    stats = seen_layer(4, 1, weights="raw")(logits)[1]
    (grad,) = torch.autograd.grad(balance_loss(stats), logits)
    p, f = softmax(logits.detach()), stats["router"].counts.double() / 6
    expected = 4 / 6 * p * (f - (f * p).sum(dim=1, keepdim=True))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


def test_the_z_loss_of_equal_logits():
    # logsumexp of E zeros is ln E.
    assert z_loss(stats_of([[0.0] * 5] * 3)).item() == pytest.approx(math.log(5) ** 2, abs=1e-15)


def test_the_z_loss_by_hand():
    # ST-MoE eq 5: logsumexp(0, ln 2, 0) = ln 4 and logsumexp(0, 0, 0) = ln 3; the mean of their squares.
    stats = stats_of([[0.0, LN2, 0.0], [0.0, 0.0, 0.0]])
    assert z_loss(stats).item() == pytest.approx((LN4**2 + LN3**2) / 2, abs=1e-15)


def test_the_z_loss_pulls_every_logit_by_its_share():
    # d/d logit = 2 / T * lse * softmax; unlike softmax it sees a constant that is added to all logits.
    logits = random_logits(5, 3).requires_grad_()
    stats = seen_layer(3, 2)(logits)[1]
    (grad,) = torch.autograd.grad(z_loss(stats), logits)
    lse = logits.detach().exp().sum(dim=1, keepdim=True).log()
    torch.testing.assert_close(grad, 2 / 5 * lse * softmax(logits.detach()), rtol=1e-12, atol=1e-15)


def test_layers_are_averaged_where_switch_sums_them():
    batches = [random_logits(9, 4, seed=seed) for seed in range(3)]
    stats, alone = layers_of(*batches), [stats_of(logits) for logits in batches]
    for loss in (balance_loss, z_loss):
        assert 3 * loss(stats).item() == pytest.approx(sum(loss(one).item() for one in alone))


def pooled(layers: list[Tensor], num_selected: int) -> float:
    """Return transformers' load_balancing_loss_func: layers pooled along the tokens, f summing to K."""
    scores = softmax(torch.cat(layers))
    num_tokens, num_experts = scores.shape
    loss = 0.0
    for rank in range(num_selected):
        chosen = scores.argsort(dim=1, descending=True)[:, rank]
        for e in range(num_experts):
            loss += (chosen == e).sum().item() / num_tokens * scores[:, e].mean().item()
    return num_experts * loss


@pytest.mark.parametrize("num_selected", [1, 2, 3])
def test_of_one_layer_the_pooled_convention_is_k_times_ours(num_selected: int):
    logits = random_logits(11, 5)
    assert pooled([logits], num_selected) == pytest.approx(
        num_selected * balance_loss(stats_of(logits, num_selected)).item()
    )


def test_pooling_layers_hides_what_cancels_between_them():
    # Layer 0 sends all to expert 0, layer 1 all to expert 1: pooled they look balanced, each alone costs E.
    first, second = torch.tensor([[40.0, 0.0]] * 4), torch.tensor([[0.0, 40.0]] * 4)
    assert pooled([first.double(), second.double()], 1) == pytest.approx(1)
    assert balance_loss(layers_of(first, second)).item() == pytest.approx(2)


def test_gshard_without_e_squared_is_ours_over_e_squared():
    # GShard algorithm 1: (1 / E) sum_e (c_e / S) m_e, with c_e the first choices.
    logits = random_logits(10, 4)
    scores = softmax(logits)
    first = torch.bincount(scores.argmax(dim=1), minlength=4)
    gshard = (first / 10 * scores.mean(dim=0)).sum().item() / 4
    assert gshard == pytest.approx(balance_loss(stats_of(logits)).item() / 4**2)


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_the_order_of_experts_does_not_matter(loss):
    logits = random_logits(13, 6)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert loss(stats_of(logits[:, order], 2)).item() == pytest.approx(
        loss(stats_of(logits, 2)).item(), abs=1e-14
    )


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_padding_does_not_matter(loss):
    logits = random_logits(8, 4)
    mask = torch.tensor([True, False, True, True, False, True, True, False])
    filled = torch.where(mask.unsqueeze(1), logits, math.nan).requires_grad_()
    layer = seen_layer(4, 2)
    padded = loss(layer(filled, mask)[1])
    assert padded.item() == pytest.approx(loss(layer(logits[mask])[1]).item(), abs=1e-14)
    (grad,) = torch.autograd.grad(padded, filled)
    assert (grad[~mask] == 0).all()
    assert torch.isfinite(grad).all()


def test_the_scope_is_the_micro_batch():
    # Half a batch to expert 0, half to expert 1: balanced as one, not as two. The z-loss is a plain mean.
    first, second = torch.tensor([[9.0, 0.0]] * 4), torch.tensor([[0.0, 9.0]] * 4)
    whole = stats_of(torch.cat([first, second]))
    halves = [stats_of(first), stats_of(second)]
    assert balance_loss(whole).item() == pytest.approx(1)
    assert sum(balance_loss(half).item() for half in halves) / 2 > 1.99
    assert z_loss(whole).item() == pytest.approx(sum(z_loss(half).item() for half in halves) / 2)


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_no_routers_and_no_tokens_cost_nothing(loss):
    assert loss(Stats()).item() == 0
    assert loss(stats_of(torch.zeros(0, 3))).item() == 0


def test_an_attached_loss_equals_the_returned_sum_bit_for_bit():
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5, num_shared_experts=1)
    x = torch.randn(7, 6, requires_grad=True)
    leaves = (x, *layer.parameters())

    y, stats = layer(x)
    extra = 0.01 * balance_loss(stats) + 0.001 * z_loss(stats)
    returned = torch.autograd.grad(y.square().mean() + extra, leaves)

    y, stats = layer(x)
    riding = attach_loss(y, 0.01 * balance_loss(stats) + 0.001 * z_loss(stats))
    assert torch.equal(riding, y)
    attached = torch.autograd.grad(riding.square().mean(), leaves)

    bare = torch.autograd.grad(layer(x)[0].square().mean(), leaves)
    for one, other in zip(returned, attached, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(bare[1], attached[1]), "the loss changes the router's gradient"
