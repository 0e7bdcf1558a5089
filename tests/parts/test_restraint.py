"""The constraint of 2013: by hand, against the slow one, its invariant, and what gets a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import restrain
from tests.oracle.restraint import restrained

ZERO = {size: torch.zeros(size, dtype=torch.float64) for size in range(1, 9)}


def constant(shares: list[float], rows: int) -> Tensor:
    """Return logits whose softmax is `shares` in every row."""
    return torch.tensor(shares, dtype=torch.float64).log().expand(rows, len(shares))


def test_the_running_assignment_by_hand():
    # Shares 1/2, 3/10, 1/5; margin 0.3. G - Gbar of the first: 1/6 after one, 1 - 2/3 = 1/3 > 0.3 after two.
    # So the third goes to the others, 0.3 / 0.5 and 0.2 / 0.5: G = 1, 1.2, 0.8, mean 1: none is ahead by 0.3.
    # Fourth and fifth as they are: G = 2, 1.8, 1.2, mean 5/3: the first is ahead by 1/3. Sixth: 0, 0.6, 0.4,
    # G = 2, 2.4, 1.6, mean 2: the second is ahead by 0.4. Seventh: 5/7, 0, 2/7.
    plain, without_first = [0.5, 0.3, 0.2], [0.0, 0.6, 0.4]
    expected = [plain, plain, without_first, plain, plain, without_first, [5 / 7, 0.0, 2 / 7]]
    found = restrain(constant(plain, 7), ZERO[3], 0.3)
    torch.testing.assert_close(found.gates, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.totals, torch.tensor([19 / 7, 2.4, 66 / 35], dtype=torch.float64))
    assert found.totals.sum().item() == pytest.approx(7)


def test_the_batched_form_by_hand():
    # Decided by the totals before the batch: all take part at first, then G = 2, 1.2, 0.8 with mean 4/3: the
    # first is out for the whole second batch, after which G = 2, 3.6, 2.4 with mean 8/3: the second is ahead
    # by 14/15.
    plain = [0.5, 0.3, 0.2]
    first = restrain(constant(plain, 4), ZERO[3], 0.3, batched=True)
    second = restrain(constant(plain, 4), first.totals, 0.3, batched=True)
    third = restrain(constant(plain, 1), second.totals, 0.3, batched=True)
    torch.testing.assert_close(first.gates, torch.tensor([plain] * 4, dtype=torch.float64))
    torch.testing.assert_close(second.gates, torch.tensor([[0.0, 0.6, 0.4]] * 4, dtype=torch.float64))
    torch.testing.assert_close(second.totals, torch.tensor([2.0, 3.6, 2.4], dtype=torch.float64))
    torch.testing.assert_close(third.gates, torch.tensor([[5 / 7, 0.0, 2 / 7]], dtype=torch.float64))


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("margin", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("batched", [False, True])
def test_it_is_the_slow_one(experts: int, margin: float, batched: bool):
    draw = torch.Generator().manual_seed(experts)
    logits = 2 * torch.randn(40, experts, generator=draw, dtype=torch.float64) + torch.arange(experts)
    # The totals go on from batch to batch.
    totals, gates = ZERO[experts], []
    for rows in logits.split(8):
        own = restrain(rows, totals, margin, batched=batched)
        totals = own.totals
        gates.append(own.gates)
    slow, after = restrained(logits.tolist(), [0.0] * experts, margin, every=8 if batched else 1)
    torch.testing.assert_close(torch.cat(gates), torch.tensor(slow, dtype=torch.float64))
    torch.testing.assert_close(totals, torch.tensor(after, dtype=torch.float64))
    if experts > 1 and margin < 3:
        assert (torch.cat(gates) == 0).any(), "nobody was left out"


def test_one_row_at_a_time_both_forms_are_one():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    totals, whole = ZERO[4], restrain(logits, ZERO[4], 0.5)
    for row, expected in zip(logits.split(1), whole.gates.split(1), strict=True):
        gates, totals = restrain(row, totals, 0.5, batched=True)
        torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(totals, whole.totals)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 25),
    st.floats(0, 4),
    st.floats(0, 50),
    st.sampled_from([1, 3, 7]),
    st.integers(0, 2**31),
)
def test_nobody_is_ahead_by_more_than_margin_and_one_step(
    experts: int, rows: int, margin: float, scale: float, batch: int, seed: int
):
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows * batch, experts, generator=draw, dtype=torch.float64)
    for batched in (False, True):
        totals, gates = ZERO[experts], []
        for piece in logits.split(batch):
            own, totals = restrain(piece, totals, margin, batched=batched)
            gates.append(own)
        so_far = torch.cat(gates).cumsum(0)
        ahead = float((so_far - so_far.mean(1, keepdim=True)).max())
        # After every example; a batch that is decided at once may add as many as it has.
        assert ahead <= margin + (batch if batched else 1) * (1 - 1 / experts) + 1e-9
        torch.testing.assert_close(totals, so_far[-1])
        torch.testing.assert_close(so_far.sum(1), torch.arange(1.0, len(logits) + 1, dtype=torch.float64))


def test_who_is_left_out_gets_no_gradient_and_the_others_that_of_the_rest():
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    totals = torch.tensor([5.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    (found,) = torch.autograd.grad((restrain(logits, totals, 1.0).gates * weights).sum(), logits)
    rest = logits.detach()[:, 1:].clone().requires_grad_()
    (expected,) = torch.autograd.grad((torch.softmax(rest, -1) * weights[1:]).sum(), rest)
    assert found[0, 0] == 0
    torch.testing.assert_close(found[:, 1:], expected)


@pytest.mark.parametrize("batched", [False, True])
def test_a_gate_that_was_sure_leaves_something_to_divide(batched: bool):
    # In fp32 the others' shares are exactly 0 beside the first.
    logits = torch.tensor([[1000.0, 0.0, math.log(3)]])
    gates, totals = restrain(logits, torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64), 1.0, batched=batched)
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0.25, 0.75]]))
    torch.testing.assert_close(totals, torch.tensor([9.0, 0.25, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("batched", [False, True])
def test_rounding_never_leaves_out_everybody(batched: bool):
    # Ten times 0.1 add up to less than 1, so that their mean is less than each of them.
    shares = torch.arange(1.0, 11, dtype=torch.float64) / 55
    totals = torch.full((10,), 0.1, dtype=torch.float64)
    gates, _ = restrain(constant(shares.tolist(), 1), totals, 0.0, batched=batched)
    torch.testing.assert_close(gates, shares.unsqueeze(0))


def test_without_bound_it_is_the_softmax_and_a_margin_below_zero_is_refused():
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restrain(logits, ZERO[3], math.inf).gates, torch.softmax(logits, -1))
    for margin in (-0.1, math.nan):
        with pytest.raises(UserError, match="allowed: 0 or more"):
            restrain(logits, ZERO[3], margin)
