"""Averaged weights and clipping, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewright.training import TrainRun
from gatewright.training.optimizer import AveragedWeights, build_adamw
from tests.training.runs import fixed_trainer


def one_weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_average_moves_as_worked_by_hand():
    layer = one_weight(0.0)
    average = AveragedWeights(layer, decay=0.9)
    nn.init.constant_(layer.weight, 11.0)
    average.update()
    # Decay 1/11: 0 + 10/11 (11 - 0).
    assert average.values[0].item() == pytest.approx(10.0, rel=1e-6)
    nn.init.constant_(layer.weight, 16.0)
    average.update()
    # Decay 2/12: 10 + 5/6 (16 - 10).
    assert average.values[0].item() == pytest.approx(15.0, rel=1e-6)
    # From step 90 on n / (n + 10) is 0.9 or more: the given decay holds. 15 + 0.1 (25 - 15).
    average.updates = 99
    nn.init.constant_(layer.weight, 25.0)
    average.update()
    assert average.updates == 100
    assert average.values[0].item() == pytest.approx(16.0, rel=1e-6)
    assert layer.weight.item() == 25.0


def test_swapping_twice_changes_nothing():
    layer = one_weight(3.0)
    average = AveragedWeights(layer, decay=0.9)
    nn.init.constant_(layer.weight, 7.0)
    average.swap()
    assert (layer.weight.item(), average.values[0].item()) == (3.0, 7.0)
    average.swap()
    assert (layer.weight.item(), average.values[0].item()) == (7.0, 3.0)


def test_evaluations_take_the_average_until_the_end_and_then_the_live_weights():
    trainer = fixed_trainer(3, ema=0.9)
    average = trainer.average
    assert average is not None
    found = []
    for _ in range(3):
        trainer.advance()
        live = trainer.model.head.weight.detach().clone()
        found.append(trainer.evaluate().bits_per_byte)
        assert torch.equal(trainer.model.head.weight, live)
    assert [point["weights"] for point in trainer.history.curve] == ["averaged", "averaged", "live"]
    # Step back into the run without averages: live weights give what the end gave; swapped in, another value.
    trainer.average = None
    assert trainer.evaluate().bits_per_byte == found[2]
    average.swap()
    trainer.step = 2
    assert trainer.evaluate().bits_per_byte not in found
    average.swap()
    trainer.average = average
    averaged = trainer.evaluate().bits_per_byte
    average.swap()
    trainer.average = None
    assert trainer.evaluate().bits_per_byte == averaged


def test_adamw_takes_the_run_s_numbers_and_decays_every_parameter():
    run = TrainRun(beta1=0.8, beta2=0.9, adam_eps=1e-7, weight_decay=0.3)
    (group,) = build_adamw(one_weight(1.0), run, 0.5).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-7, 0.3)
    # Decoupled decay alone, the gradient being 0: w (1 - lr * decay) = 1 - 0.5 * 0.3.
    layer = one_weight(1.0)
    optimizer = build_adamw(layer, run, 0.5)
    layer.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(0.85, rel=1e-6)


def test_the_first_step_of_adamw_by_hand():
    # Both corrected moments are the gradient's own, so the step is lr * sign: 1 - 0.1 * 1.
    layer = one_weight(1.0)
    optimizer = build_adamw(layer, TrainRun(weight_decay=0.0), 0.1)
    layer.weight.grad = torch.full((1, 1), 0.02)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(0.9, rel=1e-5)
