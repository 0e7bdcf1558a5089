"""OLMoE at our size against dense models: arms equal in what is said, verdicts by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from gatewright.backbones import count_cost
from gatewright.experiments import olmoe_dense
from gatewright.experiments.olmoe_dense import ACTIVE, SPARSE, TOTAL
from gatewright.experiments.registry import TARGETS


def arm(*finals: float | None, path: tuple[float, ...] = (4.0,), time: float = 1.0) -> dict[str, Any]:
    """Return an arm of 4 steps whose path leads evenly to each final value."""
    seeds = []
    for final in finals:
        ends = [*path, *([] if final is None else [final])]
        points = [{"step": 4 * (n + 1) // len(ends), "valid_bpb": bits} for n, bits in enumerate(ends)]
        seeds.append({"valid_bpb": final, "path": points})
    return {"seeds": seeds, "step_time": {"median": time}}


def record(sparse: dict[str, Any], total: dict[str, Any]) -> dict[str, Any]:
    return {"plan": {"steps": 4}, "arms": {SPARSE: sparse, ACTIVE: arm(3.0, 3.0), TOTAL: total}}


def test_expected_before_it_was_run():
    expected = tomllib.loads((Path(__file__).parents[2] / "reproductions" / "expected.toml").read_text())
    for target in ("olmoe/dense",):
        paper, table = target.split("/")
        assert set(expected[paper][table]) == {"metric", "sign", "least_effect"}
        assert target in TARGETS


def test_the_dense_models_match_in_active_flops_and_in_parameters():
    sparse, active, total = (
        count_cost(olmoe_dense.COURSE.trial(name).make(257)[0], 256) for name in (SPARSE, ACTIVE, TOTAL)
    )
    # Two layers; SwiGLU has three matrices of 64 x F, and a multiply-add counts two.
    assert sparse.flops["experts"] == active.flops["dense_ffn"] == 2 * 2 * 3 * 64 * 256
    assert total.flops["dense_ffn"] == 8 * sparse.flops["experts"]
    router = 2 * 64 * 64
    assert sparse.total_parameters - router == total.total_parameters
    for part in ("attention_projections", "attention_scores", "head"):
        assert sparse.flops[part] == active.flops[part] == total.flops[part]


def test_sparse_has_to_end_below_in_every_seed():
    # On the way from 4 to 2.5 over 4 steps (points at steps 2 and 4) 3.0 is met at 2 + 2 x 1.0 / 1.5 = 10/3.
    found = olmoe_dense.dense_verdict(record(arm(2.5, 2.5, time=1.5), arm(2.0, 2.0, time=4.0)))
    assert found["held"]
    assert found["gained_bpb"] == [0.5, 0.5]
    assert found["share_of_steps"] == pytest.approx([10 / 12, 10 / 12])
    assert "50 % of the way" in found["sentence"]
    assert "83 % of the steps and 125 % of the time" in found["sentence"]
    worse = olmoe_dense.dense_verdict(record(arm(2.5, 3.1), arm(2.0, 2.0)))
    assert not worse["held"]
    assert worse["share_of_steps"][1] is None
    assert "not at that model's final quality in every seed" in worse["sentence"]


def test_a_diverged_arm_is_named():
    found = olmoe_dense.dense_verdict(record(arm(2.5, None), arm(2.0, 2.0)))
    assert found == {"held": False, "sentence": "did not hold: sparse diverged"}
