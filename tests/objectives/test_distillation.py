"""The loss of a student: by hand, against the slow one, and what it lets through."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.objectives import Loss, distilled, soft_cross_entropy
from tests.oracle.distillation import mixed_loss


def loss_of(logits: Tensor, targets: Tensor, more: float = 0.0) -> Loss:
    task = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return Loss(task + more, task, torch.tensor(more), torch.zeros(()))


def test_one_token_by_hand():
    # Teacher (ln 3, 0): p = 3/4, 1/4. Student (ln 4, 0): q = 4/5, 1/5. The right answer is the first.
    logits = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64)
    taught = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    hard = -math.log(4 / 5)  # 0.22314
    soft = -3 / 4 * math.log(4 / 5) - 1 / 4 * math.log(1 / 5)  # 0.16736 + 0.40236 = 0.56972
    assert soft_cross_entropy(logits, taught).item() == pytest.approx(soft, abs=1e-12)
    assert soft == pytest.approx(0.56972, abs=1e-5)
    loss = distilled(loss_of(logits, torch.tensor([0])), logits, taught, 0.25)
    # 0.25 for the teacher, 0.75 for the right answer: 0.14243 + 0.16736 = 0.30979.
    assert loss.total.item() == pytest.approx(0.25 * soft + 0.75 * hard, abs=1e-12)
    assert loss.total.item() == pytest.approx(0.30979, abs=1e-5)
    # What is reported as the task stays the cross-entropy of the right answer.
    assert loss.task.item() == pytest.approx(hard, abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.75, 1.0])
def test_it_is_the_slow_one_in_value_and_gradient(weight: float):
    generator = torch.Generator().manual_seed(3)
    logits, taught = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(7, (2, 5), generator=generator)
    logits.requires_grad_()
    loss = distilled(loss_of(logits, targets), logits, taught, weight)
    rows = [own.flatten(0, 1).tolist() for own in (logits, taught)]
    slow = mixed_loss(rows[0], rows[1], targets.flatten().tolist(), weight)
    assert loss.total.item() == pytest.approx(slow, abs=1e-12)
    loss.total.backward()
    assert logits.grad is not None
    # d/d logits of the cross-entropy of any target t is q - t, here a tenth of it per token.
    target = weight * taught.softmax(-1) + (1 - weight) * torch.nn.functional.one_hot(targets, 7)
    assert torch.allclose(logits.grad, (logits.detach().softmax(-1) - target) / 10, atol=1e-12)


def test_no_gradient_reaches_the_teacher_and_other_losses_stay():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    taught = torch.randn(1, 3, 4, requires_grad=True)
    targets = torch.tensor([[0, 1, 2]])
    loss = distilled(loss_of(logits, targets, more=0.5), logits, taught, 1.0)
    loss.total.backward()
    assert taught.grad is None
    assert loss.total.item() == pytest.approx(soft_cross_entropy(logits, taught).item() + 0.5, abs=1e-6)


def test_lower_precision_is_computed_in_fp32():
    logits, taught = (torch.randn(4, 9).bfloat16() for _ in range(2))
    found = soft_cross_entropy(logits, taught)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(soft_cross_entropy(logits.float(), taught.float()).item(), abs=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_no_share_is_refused(weight: float):
    logits = torch.zeros(1, 2)
    with pytest.raises(UserError, match=r"teacher_weight .*; allowed: 0 to 1"):
        distilled(loss_of(logits, torch.tensor([0])), logits, logits, weight)
