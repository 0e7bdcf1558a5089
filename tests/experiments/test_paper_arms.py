"""Arms of OLMoE, DeepSeek and Switch at our size: equal compute in every arm, verdicts by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gatewright.experiments import bias_balance, few_experts, granularity, lab
from gatewright.experiments.lab import Arm, Plan
from gatewright.experiments.registry import TARGETS
from gatewright.experiments.steps import Stepper
from gatewright.parts import MLP

PLANS = {
    "olmoe/granularity": granularity.GRANULARITY,
    "olmoe/shared": granularity.SHARED,
    "deepseek_moe/ablation": granularity.ABLATION,
    "deepseek_v3/bias": bias_balance.PLAN,
    "switch/appendix-d": few_experts.PLAN,
}


def arm(*bits: float | None, uneven: tuple[float, ...] = ()) -> dict[str, Any]:
    seeds: list[dict[str, Any]] = [{"valid_bpb": b} for b in bits]
    for own, value in zip(seeds, uneven, strict=False):
        own["validation"] = {"max_violation": value}
    return {"causal": True, "seeds": seeds}


@pytest.mark.parametrize("target", PLANS)
def test_every_arm_has_the_active_width_of_the_others(target: str):
    assert target in TARGETS
    plan = PLANS[target]
    assert plan.arm(plan.baseline)
    for one in plan.arms:
        assert one.expert_width * (one.num_selected + one.num_shared_experts) == 256, one.name
        if target in ("olmoe/granularity", "olmoe/shared", "deepseek_moe/ablation") and one.router:
            # Equal parameters too: all experts together are as wide.
            assert one.expert_width * (one.num_experts + one.num_shared_experts) == 2048
    expected = tomllib.loads((Path(__file__).parents[2] / "reproductions" / "expected.toml").read_text())
    paper, table = target.split("/")
    assert set(expected[paper][table]) == {"metric", "sign", "least_effect"}


@pytest.mark.parametrize("target", PLANS)
def test_every_arm_is_built_and_takes_a_step(target: str):
    tokens = torch.arange(16)[None]
    for one in PLANS[target].arms:
        plan = Plan(arms=(one,), baseline=one.name, width=16, num_heads=1, num_layers=1, context=16)
        model = lab.build(plan, one, 17, seed=0)
        found = model(tokens)
        assert found.logits.shape == (1, 16, 17)
        layer = model.layers[0].feed_forward
        if one.router is None:
            assert isinstance(layer, MLP)
            continue
        assert (layer.shared is not None) == bool(one.num_shared_experts)


class Batches:
    def batch(self, step: int) -> np.ndarray:
        return (np.arange(2 * 17).reshape(2, 17) * (step + 3)) % 17


@pytest.mark.parametrize("one", bias_balance.PLAN.arms, ids=lambda one: one.name)
def test_a_bias_moves_by_its_rate_and_stays_where_a_loss_balances(one: Arm):
    plan = Plan(arms=(one,), baseline=one.name, width=16, num_heads=1, num_layers=1, context=16, steps=4)
    model = lab.build(plan, one, 17, seed=0)
    Stepper(model, Batches(), plan, one.losses, 0).advance()
    bias = model.layers[0].feed_forward.router.rule.bias.bias
    rate = one.options["rate"]
    # By one step of its rate, up or down; an expert with exactly its share stays.
    moved = bias[bias != 0].abs()
    assert torch.allclose(moved, torch.full_like(moved, rate))
    assert bool(len(moved)) == (rate > 0)
    assert (rate > 0) != bool(one.losses) or one.name == "neither"


def test_shared_experts_are_counted_and_old_arms_stay_what_they_were():
    plan = granularity.SHARED
    seeds = [{"training": {"experts_per_token": 3.0}}]
    # 2 * 3 * 64 * 64 rows of (3 chosen + 1 shared).
    assert lab._active_flops(plan, plan.arms[1], seeds) == 2 * 3 * 64 * 64 * 4
    assert "num_shared_experts" not in lab._plain(Arm("a"))
    assert lab._plain(plan.arms[1])["num_shared_experts"] == 1


def test_granularity_asks_every_seed_of_both():
    arms = {"dense twin": arm(2.5, 2.5), "8 / 1": arm(2.4, 2.4), "64 / 8": arm(2.3, 2.3)}
    assert granularity.granularity_verdict({"arms": arms})["held"]
    for name, bits in (("64 / 8", (2.3, 2.41)), ("8 / 1", (2.4, 2.6)), ("64 / 8", (2.3, None))):
        assert not granularity.granularity_verdict({"arms": {**arms, name: arm(*bits)}})["held"]


def test_the_shared_expert_s_gap_is_told_with_its_spread():
    arms = {"32 / 4": arm(2.0, 2.0), "31 / 3 + 1 shared": arm(2.01, 1.97)}
    found = granularity.shared_verdict({"arms": arms})
    assert found["gaps_bpb"] == pytest.approx([0.01, -0.03])
    assert found["sentence"].endswith("+0.0100, -0.0300 bits per byte, mean -0.0100, spread 0.0400")


def test_the_ablation_asks_for_both_steps_on_average():
    arms = {"16 / 2": arm(2.0, 2.0), "15 / 1 + 1 shared": arm(1.9, 2.05), "63 / 7 + 1 shared": arm(1.8, 2.0)}
    assert granularity.ablation_verdict({"arms": arms})["held"]
    arms["15 / 1 + 1 shared"] = arm(1.9, 2.15)
    assert not granularity.ablation_verdict({"arms": arms})["held"]


def bias_arms(best: dict[str, Any]) -> dict[str, Any]:
    others = {f"bias {rate:g}": arm(2.0, 2.0, uneven=(0.9, 0.9)) for rate in bias_balance.RATES}
    return {**others, "loss 0.01": arm(2.0, 2.0, uneven=(0.5, 0.5)), "bias 0.01": best}


@pytest.mark.parametrize(
    ("bits", "uneven", "held"),
    [
        ((2.004, 2.004), (0.1, 0.2), True),
        ((2.004, 2.008), (0.1, 0.2), False),
        ((2.0, 2.0), (0.1, 0.6), False),
        ((2.0, None), (0.1, 0.1), False),
    ],
    ids=["all of it", "worse quality", "less even in one seed", "diverged"],
)
def test_the_most_even_rate_is_judged_by_evenness_and_quality(
    bits: tuple[float, ...], uneven: tuple[float, ...], held: bool
):
    found = bias_balance.bias_verdict({"arms": bias_arms(arm(*bits, uneven=uneven))})
    assert found["held"] is held
    assert found.get("best", "bias 0.01") == "bias 0.01"


def test_few_experts_ask_every_count():
    arms = {"1 expert": arm(2.0, 2.0), **{f"{n} experts": arm(1.9, 1.95) for n in (2, 4, 8)}}
    assert few_experts.few_verdict({"arms": arms})["held"]
    arms["2 experts"] = arm(1.9, 2.01)
    assert not few_experts.few_verdict({"arms": arms})["held"]


@pytest.mark.parametrize(
    "verdict",
    [
        granularity.granularity_verdict,
        granularity.shared_verdict,
        granularity.ablation_verdict,
        few_experts.few_verdict,
    ],
)
def test_a_twin_that_diverged_is_named_and_nobody_beats_it(verdict: Any):
    names = ("8 / 1", "64 / 8", "31 / 3 + 1 shared", "15 / 1 + 1 shared", "63 / 7 + 1 shared")
    arms = {name: arm(1.9, 1.8) for name in (*names, "2 experts", "4 experts", "8 experts")}
    diverged = {name: arm(2.0, None) for name in ("dense twin", "32 / 4", "16 / 2")}
    found = verdict({"arms": {**arms, **diverged}})
    assert found == {"held": False, "sentence": "did not hold: dense twin, 32 / 4, 16 / 2 diverged"}
