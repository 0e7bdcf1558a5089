"""Learning rates, worked by hand."""

from __future__ import annotations

import math

import pytest

from gatewright.training import SCHEDULES, rate_factor
from tests.training.runs import fixed_trainer


def test_every_schedule_is_held_here():
    assert SCHEDULES == ("constant", "cosine", "wsd", "inverse_sqrt")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_peak(schedule: str):
    factors = [rate_factor(schedule, step, 0.0, warmup_steps=4) for step in range(4)]
    assert factors == [0.25, 0.5, 0.75, 1.0]
    assert rate_factor(schedule, 0, 0.0, warmup_steps=0) == 1.0


def test_constant_stays_after_warm_up():
    assert [rate_factor("constant", s, p, warmup_steps=2) for s, p in ((2, 0.1), (50, 0.5), (99, 1.0))] == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 1.0),
        # 0.1 + 0.9 (1 + cos 45 degrees) / 2
        (0.25, 0.1 + 0.45 * (1 + math.sqrt(0.5))),
        (0.5, 0.55),
        # cos 120 degrees = -1/2
        (2 / 3, 0.1 + 0.45 * 0.5),
        (1.0, 0.1),
        (1.7, 0.1),
    ],
)
def test_cosine(progress: float, factor: float):
    assert rate_factor("cosine", 50, progress, warmup_steps=4, final_rate=0.1) == pytest.approx(
        factor, abs=1e-12
    )
    # In warm-up both hold: step 1 of 4 is half the way up.
    halved = rate_factor("cosine", 1, progress, warmup_steps=4, final_rate=0.1)
    assert halved == pytest.approx(factor / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.0, 1), (0.59, 1), (0.6, 1), (0.7, 0.755), (0.8, 0.51), (0.9, 0.265), (1.0, 0.02)],
)
def test_warm_up_stable_decay(progress: float, factor: float):
    # The last 40 % fall linearly from 1 to 0.02: 1 - 0.98 * (progress - 0.6) / 0.4.
    found = rate_factor("wsd", 50, progress, warmup_steps=4, decay_share=0.4, final_rate=0.02)
    assert found == pytest.approx(factor, abs=1e-12)


def test_the_ends_of_the_decay_share():
    assert rate_factor("wsd", 50, 1.0, warmup_steps=4, decay_share=0.0, final_rate=0.02) == 1.0
    assert rate_factor("wsd", 50, 0.5, warmup_steps=4, decay_share=1.0, final_rate=0.02) == pytest.approx(
        0.51
    )


@pytest.mark.parametrize(("step", "factor"), [(3, 1.0), (15, 0.5), (35, 1 / 3), (399, 0.1)])
def test_inverse_square_root(step: int, factor: float):
    # sqrt(4 / (step + 1)), step counted from 0.
    assert rate_factor("inverse_sqrt", step, 0.5, warmup_steps=4) == pytest.approx(factor, abs=1e-12)
    assert rate_factor("inverse_sqrt", step, 0.5, warmup_steps=0) == pytest.approx(factor / 2, abs=1e-12)


def test_the_trainer_takes_the_rate_of_the_step_it_is_at():
    trainer = fixed_trainer(
        10, learning_rate=0.01, warmup_steps=2, schedule="wsd", decay_share=0.4, final_rate=0.0
    )
    rates = [trainer.advance()["learning_rate"] for _ in range(10)]
    by_hand = [0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    assert rates == pytest.approx(by_hand, abs=1e-12)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0025], abs=1e-12)


def test_a_limit_in_minutes_drives_the_schedule_where_the_clock_is_ahead():
    trainer = fixed_trainer(100, minutes=1.0, warmup_steps=0, schedule="wsd", decay_share=0.5, final_rate=0.0)
    assert trainer.progress == 0.0
    trainer.seconds = 45.0
    assert trainer.progress == 0.75
    assert trainer.advance()["learning_rate"] == pytest.approx(0.5 * trainer.run.learning_rate)
    trainer.step = 90
    assert trainer.progress == 0.9
    trainer.seconds = 60.0
    assert trainer.done
    assert trainer.progress == 1.0


def test_a_loss_to_reach_ends_the_run_at_an_evaluation():
    trainer = fixed_trainer(100, until_loss=3.0)
    assert not trainer.done
    trainer.history.curve.append({"valid_bpb": 3.01})
    assert not trainer.done
    trainer.history.curve.append({"valid_bpb": 3.0})
    assert trainer.done
