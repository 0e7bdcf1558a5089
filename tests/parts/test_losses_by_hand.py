"""Losses worked by hand: sequence and global scopes, GShard's, importance, load, devices, communication."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import Stats, balance_loss
from gatewright.parts.balancing import gshard_loss
from gatewright.parts.device_losses import communication_loss, device_loss
from gatewright.parts.losses import LOSSES
from gatewright.parts.variation import importance_loss, load_loss, squared_variation
from tests.parts.seen import random_logits, softmax, stats_of, with_sums

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def exact(value: float) -> object:
    """Return what equals a value up to rounding."""
    return pytest.approx(value, abs=1e-14)


def test_the_sequence_scope_by_hand():
    # Two sequences, E = 2, K = 1. First: scores (3/4, 1/4) twice: f = (1, 0), P = (3/4, 1/4): 2 * 3/4 = 3/2.
    # Second: (3/4, 1/4) and (1/4, 3/4): f = P = (1/2, 1/2): 1. Mean 5/4.
    # As one micro-batch: f = (3/4, 1/4), P = (5/8, 3/8): 2 * (15/32 + 3/32) = 9/8.
    x = torch.tensor([[[LN3, 0.0], [LN3, 0.0]], [[LN3, 0.0], [0.0, LN3]]], dtype=torch.float64)
    assert balance_loss(stats_of(x), "sequence").item() == exact(5 / 4)
    assert balance_loss(stats_of(x), "micro_batch").item() == exact(9 / 8)
    assert LOSSES["sequence_balance"](stats_of(x)).item() == exact(5 / 4)


def test_a_sequence_of_padding_is_left_out():
    first, second = [[LN3, 0.0], [LN3, 0.0]], [[LN3, 0.0], [0.0, LN3]]
    x = torch.tensor([first, second, first], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    for loss in (gshard_loss, LOSSES["sequence_balance"]):
        assert loss(stats_of(x, mask=mask)).item() == exact(5 / 4)


def test_the_global_scope_by_hand():
    # Local scores (3/4, 1/4), all to expert 0; the other ranks made it even: counts (4, 4), f = (1/2, 1/2):
    # 2 * (3/8 + 1/8) = 1. With counts (6, 2): 2 * (9/16 + 1/16) = 5/4.
    stats = stats_of([[LN3, 0.0]] * 2)
    for counts, value in (([4, 4], 1), ([6, 2], 5 / 4), ([8, 0], 3 / 2)):
        handed = {"router": torch.tensor(counts)}
        assert balance_loss(stats, "global_batch", handed).item() == exact(value)


def test_the_gshard_loss_by_hand():
    # E = 3, K = 2, T = 2, exp = (4, 2, 1), (4, 1, 2): first choices (2, 0, 0), c / S = (1, 0, 0), m_0 = 4/7.
    # Printed: (1/3) * 4/7 = 4/21; times E^2: 12/7. All choices count in the balance loss: 33/28.
    stats = stats_of([[LN4, LN2, 0.0], [LN4, 0.0, LN2]], 2)
    assert gshard_loss(stats).item() == exact(12 / 7)
    assert balance_loss(stats).item() == exact(33 / 28)


def test_gshards_groups_are_averaged():
    # Groups of 2: the first sends both to expert 0, (3/4, 1/4) twice: 2 * 3/4; the second is even: 1.
    stats = stats_of([[LN3, 0.0], [LN3, 0.0], [LN3, 0.0], [0.0, LN3]], group_size=2)
    assert gshard_loss(stats).item() == exact((3 / 2 + 1) / 2)


def even(num_experts: int) -> Tensor:
    """Return logits [E, E] in which token t prefers experts t, t + 1, ...: counts and sums are even."""
    row = torch.zeros(num_experts, dtype=torch.float64)
    row[:4] = torch.tensor([2.0, 1.5, 1.2, 1.0])
    return torch.stack([row.roll(t) for t in range(num_experts)])


@pytest.mark.parametrize("num_selected", [1, 2, 4])
@pytest.mark.parametrize("num_experts", [4, 8])
def test_values_when_balanced(num_selected: int, num_experts: int):
    # 1 for what multiplies f by P; 0 for CV^2, whose 1 + CV^2 is 1.
    logits = even(num_experts)
    stats = stats_of(torch.stack([logits, logits]), num_selected)
    counts = {"router": torch.full((num_experts,), 7)}
    assert balance_loss(stats, "sequence").item() == exact(1)
    assert balance_loss(stats, "global_batch", counts).item() == exact(1)
    assert gshard_loss(stats).item() == exact(1)
    assert importance_loss(stats).item() == exact(0)
    assert load_loss(stats).item() == exact(0)
    for num_devices in (1, 2, 4):
        assert device_loss(stats, num_devices).item() == exact(1)
        # Each token reaches M devices, each device receives M T / D of the T = 2 E tokens.
        for kept in range(1, num_devices + 1):
            received = torch.full((num_devices,), kept * 2 * num_experts // num_devices)
            sent = with_sums(stats, device_counts=received)
            assert communication_loss(sent, num_devices, kept).item() == exact(1)
    cosine = with_sums(stats, cosine_importance=torch.full((num_experts,), 2.0, dtype=torch.float64))
    assert LOSSES["cosine"](cosine).item() == exact(1)


def test_squared_variation_by_hand():
    # Mean 2, deviations -1, 0, 1: variance 2/3 (not 1: the population's), over 4 is 1/6.
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = squared_variation(values)
    assert value.item() == exact(1 / 6)
    # 1 + CV^2 = E sum v^2 / (sum v)^2 = 3 * 14 / 36.
    assert 1 + value.item() == exact(3 * 14 / 36)
    # d/dv_e of E sum v^2 / S^2 = 2 E / S^2 (v_e - sum v^2 / S) = 1/6 (v_e - 14/6).
    (grad,) = torch.autograd.grad(value, values)
    torch.testing.assert_close(grad, (values.detach() - 14 / 6) / 6)


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0]])
def test_even_and_empty_values_have_no_variation_and_no_nan(values: list[float]):
    leaf = torch.tensor(values, requires_grad=True)
    (grad,) = torch.autograd.grad(squared_variation(leaf), leaf)
    assert squared_variation(leaf).item() == 0
    assert grad.tolist() == [0, 0]


def test_one_expert_with_all_costs_e_minus_one():
    assert squared_variation(torch.tensor([0.0, 5.0, 0.0, 0.0])).item() == pytest.approx(3)


def test_importance_and_load_by_hand():
    # Scores 3/4, 1/4 three times and 1/4, 3/4 once: sums (5/2, 3/2), mean 2, variance 1/4: 1/16.
    # Counts (3, 1): mean 2, variance 1: 1/4.
    stats = stats_of([[LN3, 0.0]] * 3 + [[0.0, LN3]])
    assert importance_loss(stats).item() == exact(1 / 16)
    assert load_loss(stats).item() == exact(1 / 4)


def test_a_routers_own_importance_and_load_come_first():
    # (1, 3): mean 2, variance 1: 1/4. (1, 1, 4): mean 2, variance 2: 1/2.
    two = torch.tensor([1.0, 3.0], dtype=torch.float64)
    three = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    stats = with_sums(stats_of([[LN3, 0.0]] * 2), importance=two, load=two)
    assert (importance_loss(stats).item(), load_loss(stats).item()) == (exact(1 / 4), exact(1 / 4))
    stats = with_sums(stats_of([[LN3, 0.0, 0.0]] * 2), importance=three, load=three)
    assert (importance_loss(stats).item(), load_loss(stats).item()) == (exact(1 / 2), exact(1 / 2))


def test_counts_give_the_load_loss_no_gradient():
    logits = random_logits(6, 4).requires_grad_()
    stats = stats_of(logits)
    assert importance_loss(stats).requires_grad
    assert not load_loss(stats).requires_grad


def test_the_device_loss_by_hand():
    # E = 4, D = 2, K = 1, T = 4, exp = (5, 1, 1, 1) three times, (1, 1, 1, 5) once: counts (3, 0, 0, 1).
    # f = 4 / 4 * counts; f' = (3/2, 1/2). P = (16, 4, 4, 8) / 32; P' = (5/8, 3/8). 15/16 + 3/16 = 9/8.
    ln5 = math.log(5)
    stats = stats_of([[ln5, 0.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 0.0, ln5]])
    assert device_loss(stats, 2).item() == exact(9 / 8)
    assert device_loss(stats, 4).item() == exact(balance_loss(stats).item())
    assert device_loss(stats, 1).item() == exact(1)


def test_the_device_loss_does_not_see_inside_a_device():
    # All tokens to experts 0 and 2, one on each device: devices are even, experts are not.
    stats = stats_of([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    assert device_loss(stats, 2).item() == exact(1)
    assert balance_loss(stats).item() > 1.9


def test_the_communication_loss_by_hand():
    # E = 4, D = 2, K = 2, M = 2, T = 2. exp = (4, 2, 1, 1): experts 0, 1, both on device 0: one copy there.
    # exp = (4, 1, 2, 1): experts 0, 2, a copy to each device. Received (2, 1); f'' = 2 / (2 * 2) * (2, 1).
    # P = (1/2, 3/16, 3/16, 1/8); P'' = (11/16, 5/16). 11/16 + 5/32 = 27/32: under 1, a token saves one.
    stats = stats_of([[LN4, LN2, 0.0, 0.0], [LN4, 0.0, LN2, 0.0]], 2)
    sent = with_sums(stats, device_counts=torch.tensor([2, 1]))
    assert communication_loss(sent, 2, 2).item() == exact(27 / 32)
    assert communication_loss(sent, 2, 1).item() == exact(27 / 16)


def test_device_losses_pull_by_their_f_only():
    # d/d logits of sum_e c_e P_e with c constant: p_e (c_e - sum_j c_j p_j) / T.
    logits = random_logits(5, 6).requires_grad_()
    stats = with_sums(stats_of(logits, 2), device_counts=torch.tensor([3, 1, 4]))
    p, counts = softmax(logits.detach()), stats["router"].counts.double()
    device = (6 / 10 * counts).view(3, 2).mean(dim=1).repeat_interleave(2)
    received = (3 / (2 * 5) * torch.tensor([3.0, 1.0, 4.0]).double()).repeat_interleave(2)
    for loss, c in ((device_loss(stats, 3), device), (communication_loss(stats, 3, 2), received)):
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(grad, p * (c - (c * p).sum(dim=1, keepdim=True)) / 5)


def test_wrong_devices_are_refused():
    stats = with_sums(stats_of([[0.0] * 4]), device_counts=torch.tensor([1, 0]))
    with pytest.raises(UserError, match="num_devices 3 for the 4 experts of router 'router'"):
        device_loss(stats, 3)
    with pytest.raises(UserError, match="devices_kept 3 of num_devices 2; allowed: 1 to num_devices"):
        communication_loss(stats, 2, 3)
    with pytest.raises(UserError, match="counts tokens of 2 devices, num_devices is 4"):
        communication_loss(stats, 4, 1)
    with pytest.raises(UserError, match="loss 'communication' needs the sum 'device_counts'"):
        communication_loss(stats_of([[0.0] * 4]), 2, 1)


def test_wrong_scopes_and_counts_are_refused():
    stats, counts = stats_of([[0.0] * 4]), torch.ones(4, dtype=torch.int64)
    with pytest.raises(UserError, match="scope 'sequences' is unknown; did you mean 'sequence'"):
        balance_loss(stats, "sequences")
    with pytest.raises(UserError, match="scope 'global_batch' without counts"):
        balance_loss(stats, "global_batch")
    with pytest.raises(UserError, match="scope 'sequence' with counts"):
        balance_loss(stats, "sequence", {"router": counts})
    with pytest.raises(UserError, match=r"counts hold no router 'router'.*given: other"):
        balance_loss(stats, "global_batch", {"other": counts})
    with pytest.raises(UserError, match=r"have shape \(3,\); allowed: \(4,\)"):
        balance_loss(stats, "global_batch", {"router": counts[:3]})


@pytest.mark.parametrize("name", ["balance", "sequence_balance", "gshard", "importance", "load", "z"])
def test_nothing_costs_nothing(name: str):
    assert LOSSES[name](Stats()).item() == 0
    assert LOSSES[name](stats_of(torch.zeros(0, 3))).item() == 0
