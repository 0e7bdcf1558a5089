"""Table 3, drops, figure 1 and places of the Switch Transformer: what arms differ in, verdicts by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.experiments import (
    lab,
    switch_drops,
    switch_figure1,
    switch_slots,
    switch_table3,
)
from gatewright.experiments.arms import quick_form
from tests.experiments.test_switch_arms import differing, small
from tests.training.runs import FixedText


def at_steps(*runs: list[float] | None) -> dict[str, Any]:
    """Return an arm's record from its bits per byte at steps 4, 8, ... by seed; None diverged at once."""
    seeds = []
    for own in runs:
        points = [{"step": 4 * (i + 1), "valid_bpb": value} for i, value in enumerate(own or [])]
        seeds.append({"valid_bpb": own[-1] if own else None, "path": points})
    return {"seeds": seeds}


def table3(small: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    twin = at_steps([3.0, 2.0], [3.0, 2.0], [3.0, 2.0])
    arms = {"0.1x": small, "dense 0.1x": twin, "1.0x": usual, "dense 1.0x": twin}
    return {"plan": {"steps": 16}, "arms": arms}


# A quarter of 16 steps is step 4. SD of 3.0, 3.1, 3.2 is 0.1.
TIGHT = at_steps([3.0, 1.0], [3.1, 2.0], [3.2, 3.0])


@pytest.mark.parametrize(
    ("usual", "held"),
    [
        (at_steps([3.1, 2.0], [3.3, 2.0], [3.51, 2.0]), True),
        (at_steps([3.1, 2.0], [3.3, 2.0], [3.48, 2.0]), False),
        (at_steps([3.1, 2.0], [3.3, 2.0], None), True),
    ],
    ids=["twice the spread", "a little less", "a run diverged"],
)
def test_table_3_asks_for_half_the_spread_early_and_not_at_the_end(usual: dict[str, Any], held: bool):
    found = switch_table3.table3_verdict(table3(TIGHT, usual))
    assert found["held"] is held
    assert found["early_step"] == 4
    assert found["spread"]["0.1x"] == pytest.approx(0.1)
    json.dumps(found, allow_nan=False)


def test_table_3_does_not_hold_where_the_small_scale_diverges():
    found = switch_table3.table3_verdict(table3(at_steps([3.0, 1.0], [3.1, 2.0], None), TIGHT))
    assert not found["held"]
    assert found["diverged"] == {"0.1x": 1, "dense 0.1x": 0, "1.0x": 0, "dense 1.0x": 0}


def test_unequal_spread_by_hand():
    # Sums 0, 6, 6, 12, mean 6; differences 0, 0, 2, 2, mean 1. Covariance sum 6 + 0 + 0 + 6 = 12, squares 72
    # and 4: r = 12 / sqrt(288) = 0.7071; t = r sqrt(2 / (1 - 1 / 2)) = 1.4142 with 2 degrees: p = 0.1464.
    one, two = [0.0, 3.0, 2.0, 5.0], [0.0, 3.0, 4.0, 7.0]
    assert switch_table3.unequal_spread(one, two) == pytest.approx(0.1464, abs=1e-4)
    assert switch_table3.unequal_spread(one, one) is None
    assert switch_table3.unequal_spread(one[:2], two[:2]) is None


def test_table_3_s_arms_differ_in_the_scale_alone_and_have_it():
    plan = switch_table3.PLAN
    assert plan.num_layers >= 8
    assert plan.seeds == tuple(range(8))
    assert quick_form(plan).seeds == (0, 1, 2)
    assert plan.steps % (4 * 2) == 0, "an evaluation falls on a quarter of the steps"
    for one, other in (("0.1x", "1.0x"), ("dense 0.1x", "dense 1.0x")):
        assert differing(plan.arm(one), plan.arm(other)) == {"init_scale"}
        flat = dataclasses.replace(plan, num_layers=1)
        models = [lab.build(flat, plan.arm(name), 17, seed=0) for name in (one, other)]
        for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
            norm, embedding = a.dim() == 1, name == "embedding.weight"
            factor = 1.0 if norm or embedding else 0.1**0.5
            assert torch.allclose(a, b * factor, rtol=1e-4), name


def shares(dropped: float | None, bits: float = 3.0) -> dict[str, Any]:
    own: dict[str, Any] = {"valid_bpb": bits}
    if dropped is None:
        own["valid_bpb"] = None
    else:
        own["training"] = {"dropped": dropped}
    return {"seeds": [own, own], "padded_step_time": {"median": 1.0}}


def drops(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return arms that drop 0.2 / 0.1 / 0.05 / 0.02 without a loss by f, and a hundredth of it with 0.01."""
    arms = {}
    for factor, bare in zip(switch_drops.FACTORS, (0.2, 0.1, 0.05, 0.02), strict=True):
        for alpha, of in zip(switch_drops.COEFFICIENTS, (1.0, 0.5, 0.01, 0.001), strict=True):
            arms[switch_drops.named(factor, alpha)] = shares(bare * of, 3.0 + bare * of)
    return {"arms": arms | changes}


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"f 1.5, alpha 0.001": shares(0.09)}, False),
        ({"f 1.25, alpha 0.01": shares(0.0101)}, False),
        ({"f 2, alpha 0": shares(0.0001)}, False),
        ({"f 1, alpha 0.1": shares(None)}, False),
    ],
    ids=["all of it", "more with more room", "above 1 %", "more with the loss", "diverged"],
)
def test_the_verdict_on_drops_asks_for_all_three(changes: dict[str, Any], held: bool):
    found = switch_drops.drops_verdict(drops(**changes))
    assert found["held"] is held
    json.dumps(found, allow_nan=False)


def test_the_arms_of_drops_differ_in_capacity_and_loss_alone():
    arms = switch_drops.PLAN.arms
    assert len(arms) == 16
    for one, other in itertools.combinations(arms, 2):
        assert differing(one, other) <= {"capacity", "losses"}
    # 2048 tokens, 16 experts: an even share is 128.
    places = {arm.name: arm.capacity.places(1, 2048, 16, True) for arm in arms if arm.capacity}
    assert [places[switch_drops.named(f, 0.01)] for f in switch_drops.FACTORS] == [128, 160, 192, 256]
    assert {arm.capacity.places(1, 99, 16, False) for arm in arms if arm.capacity} == {99}


def test_a_power_law_through_exact_points_is_found_and_predicts():
    sizes = [1e4, 2e4, 4e4, 8e4]
    law = switch_figure1.fit(sizes, [5.0 * n**-0.1 for n in sizes])
    assert (law.a, law.b) == pytest.approx((5.0, 0.1))
    assert law.at(16e4) == pytest.approx((5.0 * 16e4**-0.1,) * 3)
    # ln N = 0, 1, 2; ln L = 0, 1, 0: a flat line through 1/3, residuals -1/3, 2/3, -1/3, SD sqrt(6 / 9).
    law = switch_figure1.fit([1.0, math.e, math.e**2], [1.0, math.e, 1.0])
    assert (math.log(law.a), law.b, law.deviation) == pytest.approx((1 / 3, 0.0, (6 / 9) ** 0.5))
    # At ln N = 3: 12.706 SD sqrt(1 + 1/3 + 4/2), one degree of freedom.
    low = math.log(law.at(math.e**3)[1])
    assert low == pytest.approx(1 / 3 - 12.7062 * (6 / 9) ** 0.5 * (10 / 3) ** 0.5, abs=1e-3)


def counted(*means: float | None) -> dict[str, Any]:
    """Return arms of 1, 2, ... 64 experts with those bits per byte; sizes 100 times the count."""
    arms = {}
    for count, mean in zip(switch_figure1.COUNTS, means, strict=True):
        path = [] if mean is None else [{"step": 8, "valid_bpb": mean}]
        seeds = [{"valid_bpb": mean, "path": path}] * 2
        times = {"step_time": {"median": 1.0}, "padded_step_time": {"median": 1.5}}
        own = {"seeds": seeds, "cost": {"total_parameters": 100 * count}}
        arms[switch_figure1.named(count)] = own | times
    return {"arms": arms}


LAW = [4.0 * (100 * n) ** -0.1 for n in switch_figure1.COUNTS]


@pytest.mark.parametrize(
    ("means", "held"),
    [
        (LAW, True),
        ([*LAW[:-1], LAW[-1] * 1.0101], False),
        ([*LAW[:-1], LAW[-1] * 0.9899], False),
        ([*LAW[:3], LAW[2] * 1.001, *LAW[4:]], False),
        ([*LAW[:3], None, *LAW[4:]], False),
    ],
    ids=["the law", "flattens", "falls faster", "a doubling does not help", "diverged"],
)
def test_figure_1_asks_for_every_doubling_and_for_the_prediction(means: list[float | None], held: bool):
    found = switch_figure1.figure1_verdict(counted(*means))
    assert found["held"] is held
    json.dumps(found, allow_nan=False)


def test_the_largest_takes_no_part_in_the_fit():
    found = switch_figure1.figure1_verdict(counted(*LAW[:-1], 9.0))
    assert found["predicted"] == pytest.approx(LAW[-1])


def test_figure_1_s_arms_have_equal_flops_but_for_the_router():
    plan = switch_figure1.PLAN
    costs = [lab.cost_of(plan, arm, 257) for arm in plan.arms]
    ffn = {own["flops"]["experts"] + own["flops"]["dense_ffn"] for own in costs}
    assert ffn == {2 * 2 * 3 * 64 * 256}
    assert [own["flops"]["router"] for own in costs] == [0, *(2 * 2 * 64 * n for n in (2, 4, 8, 16, 32, 64))]
    sizes = [own["total_parameters"] for own in costs]
    assert sizes == sorted(sizes)
    for one, other in itertools.combinations(plan.arms[1:], 2):
        assert differing(one, other) == {"num_experts", "capacity"}


def test_places_of_a_batch_add_up_and_choices_do_not_depend_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(switch_slots, "open_corpus", lambda *_, **__: FixedText())
    monkeypatch.setattr(switch_slots, "PLAN", small(switch_slots.PLAN, width=16))
    record, page, pictures = switch_slots.run_slots(tmp_path, quick=False)
    tight, loose = record["factors"]
    # 2 x 8 tokens over 16 experts: an even share is 1; ceil(1.5) is 2.
    assert (record["tokens"], tight["places"], loose["places"]) == (16, 1, 2)
    assert tight["counts"] == loose["counts"]
    for own in (tight, loose):
        assert sum(own["counts"]) == 16
        assert own["kept"] == [min(made, own["places"]) for made in own["counts"]]
    lost = 16 - sum(tight["kept"])
    assert f"{16 - lost} of 16 places are filled, {lost} stay empty and {lost} tokens overflow" in page
    assert pictures["batch"].read_bytes().startswith(b"\x89PNG")
    json.dumps(record, allow_nan=False)
