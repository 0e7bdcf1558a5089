"""The peak of training steps against its floor, and what recomputing blocks saves of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gatewright.measuring.memory import check_memory_can_be_measured
from gatewright.measuring.step_memory import StepMemory, floor_of, step_memory
from gatewright.papers.mixtral import Settings
from gatewright.training import TrainRun

MODEL = Settings(
    width=128, num_layers=5, num_heads=2, head_dim=64, num_experts=4, num_selected=2, expert_width=256
)
RUN = TrainRun(model=MODEL, batch_tokens=2048)


def can_be_measured() -> bool:
    try:
        check_memory_can_be_measured()
    except Exception:
        return False
    return True


def test_the_floor_worked_by_hand():
    memory = StepMemory(
        peak=100, weights=4, gradients=4, optimizer=8, averages=4, activations=40, accumulation=1
    )
    # Gradients come as activations go: the larger of both, but both where gradients are held meanwhile.
    assert memory.floor == 4 + 8 + 4 + 40
    assert replace(memory, accumulation=2).floor == 4 + 8 + 4 + 40 + 4
    assert memory.over_floor == pytest.approx(100 / 56)
    assert memory.to_dict()["floor"] == 56


def test_the_floor_follows_the_run():
    plain = floor_of(RUN, 1)
    count = plain.weights // 4
    assert (plain.gradients, plain.optimizer, plain.averages) == (4 * count, 8 * count, 4 * count)
    assert floor_of(replace(RUN, ema=0.0), 1).averages == 0
    assert floor_of(replace(RUN, accumulation=4), 1).activations == pytest.approx(plain.activations / 4)
    assert floor_of(replace(RUN, precision="bf16"), 1).activations < plain.activations
    assert floor_of(replace(RUN, recompute="blocks"), 1).activations < plain.activations / 2


@pytest.mark.skipif(not can_be_measured(), reason="a process's peak cannot be set back here")
def test_a_step_holds_little_more_than_its_floor_and_recomputed_blocks_less():
    kept, recomputed = step_memory(RUN), step_memory(replace(RUN, recompute="blocks"))
    assert kept is not None
    assert recomputed is not None
    assert 0.9 < kept.over_floor < 1.35
    assert 0.9 < recomputed.over_floor < 1.6
    # Four of five blocks' activations need no place any more.
    saved = kept.activations - recomputed.activations
    assert kept.peak - recomputed.peak > 0.6 * saved
