"""OLMoE at our size against dense models: arms equal in what is said, verdicts by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.backbones import count_cost
from gatewright.experiments import olmoe_dense, olmoe_stability
from gatewright.experiments.olmoe_dense import ACTIVE, SPARSE, TOTAL
from gatewright.experiments.olmoe_stability import BASE, NO_NORM, NO_Z, PLAIN
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
    for target in ("olmoe/dense", "olmoe/stability"):
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


def test_each_arm_of_stability_lacks_what_its_name_says():
    made = {}
    for trial in olmoe_stability.COURSE.trials:
        torch.manual_seed(0)
        made[trial.name] = trial.make(257)
    base = made[BASE][0].state_dict()
    for name in (NO_Z, NO_NORM):
        own = made[name][0].state_dict()
        assert all(torch.equal(weight, base[key]) for key, weight in own.items())
    assert [made[name][1].z_weight for name in (BASE, NO_Z, NO_NORM, PLAIN)] == [0.001, 0.0, 0.001, 0.001]
    assert {objective.balance_weight for _, objective in made.values()} == {0.01}
    norms = {name: {block.attention.qk_norm for block in model.layers} for name, (model, _) in made.items()}
    assert norms == {BASE: {"width"}, NO_Z: {"width"}, NO_NORM: {"none"}, PLAIN: {"width"}}
    for name, (model, _) in made.items():
        for weight in (p.detach() for p in model.parameters() if p.dim() > 1):
            # Of thousands of plain draws some lie beyond 3 std; the cut lets none.
            assert (weight.abs().max() > 3 * 0.02) == (name == PLAIN)
            assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
        assert model.layers[0].attention_norm.weight.eq(1).all()


def test_spikes_are_counted_by_hand():
    # Sixteen 1s and sixteen 3s: mean 2, standard deviation 1, so that a loss above 6 is a spike.
    calm = [1.0, 3.0] * 16
    assert olmoe_stability.spikes([*calm, 6.0]) == 0
    assert olmoe_stability.spikes([*calm, 6.1]) == 1
    assert olmoe_stability.spikes([*calm, 6.1, 2.0]) == 1
    assert olmoe_stability.spikes([9.0]) == 0


def test_a_run_that_ends_half_a_nat_up_went_up():
    # Twentieths of 40 steps are pairs.
    falling = [4.0 - 0.05 * step for step in range(40)]
    assert not olmoe_stability.went_up(falling)
    assert not olmoe_stability.went_up([*falling[:38], 2.6, 2.6])
    assert olmoe_stability.went_up([*falling[:38], 2.7, 2.7])


def stable(*finals: float | None, up: bool = False) -> dict[str, Any]:
    runs = [{"valid_bpb": bits, "spikes": 1, "went_up": up} for bits in finals]
    return {"seeds": [{"valid_bpb": None} if own["valid_bpb"] is None else own for own in runs]}


def test_qk_norm_is_judged_and_the_others_only_told():
    arms = {
        BASE: stable(2.0, 2.0),
        NO_Z: stable(1.9, 1.8),
        NO_NORM: stable(2.3, 1.9),
        PLAIN: stable(2.0, 2.0),
    }
    found = olmoe_stability.stability_verdict({"arms": arms})
    assert found["held"]
    assert found["above_bpb"][NO_NORM] == pytest.approx([0.3, -0.1])
    assert not olmoe_stability.stability_verdict({"arms": {**arms, NO_NORM: stable(2.1, 1.8)}})["held"]
    gone = olmoe_stability.stability_verdict({"arms": {**arms, NO_NORM: stable(1.9, None)}})
    assert gone["held"]
    assert "no QK-norm ends nowhere above, 1 seeds diverged" in gone["sentence"]
    assert olmoe_stability.stability_verdict({"arms": {**arms, NO_NORM: stable(1.9, 1.9, up=True)}})["held"]
    base = olmoe_stability.stability_verdict({"arms": {**arms, BASE: stable(2.0, None)}})
    assert not base["held"]
    assert "1 seeds of the model as the paper diverged" in base["sentence"]
