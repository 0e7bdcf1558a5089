"""Arms of the Switch Transformer's tables: what differs between them, and verdicts by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest

from gatewright.data import Corpus
from gatewright.experiments import lab, rules_compared, switch_table1
from gatewright.experiments.lab import Arm, Plan
from gatewright.experiments.lab_pages import lab_page
from gatewright.experiments.paired import interval, paired
from gatewright.experiments.registry import TARGETS
from gatewright.experiments.switch_targets import SWITCH
from gatewright.experiments.t_test import quantile
from gatewright.parts import Capacity
from tests.training.runs import FixedText

PLANS = {"switch/table1": switch_table1.PLAN}
WHERE = {"gatewright": "0", "commit": "x", "torch": "2", "threads": 1, "processor": "p"}


def differing(one: Arm, other: Arm) -> set[str]:
    """Return the fields in which two arms differ, beside what they are called."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return {key for key in a if a[key] != b[key]} - {"name", "note"}


def small(plan: Plan, **changes: Any) -> Plan:
    """Return a plan that runs in seconds on fixed text."""
    own: dict[str, Any] = {"width": 8, "num_heads": 1, "context": 8, "rows": 2, "steps": 4, "seeds": (0,)}
    own |= {"warmup_steps": 1, "eval_bytes": 64, "timing_rounds": 1, "num_layers": 1}
    return dataclasses.replace(plan, **own | changes)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the default corpus."""
    monkeypatch.setattr(lab, "open_corpus", lambda *_, **__: FixedText())


@pytest.mark.parametrize("target", SWITCH)
def test_every_target_has_its_expectation(target: str):
    assert target in TARGETS
    expected = tomllib.loads((Path(__file__).parents[2] / "reproductions" / "expected.toml").read_text())
    paper, table = target.split("/")
    assert set(expected[paper][table]) == {"metric", "sign", "least_effect"}


def test_the_interval_of_a_mean_difference_by_hand():
    # Two sides of 5 %, 2 degrees: 4.3027 in any table of Student's t; 1 degree: 12.706.
    assert quantile(2) == pytest.approx(4.3027, abs=1e-4)
    assert quantile(1) == pytest.approx(12.706, abs=1e-3)
    # 1, 2, 3: mean 2, deviation 1, reach 4.3027 / sqrt(3) = 2.4841.
    found = paired([1.0, 2.0, 3.0])
    assert found is not None
    assert found == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-4)
    assert interval([1.0, 2.0, 3.0], 2) == "mean +2.00 (95 % from -0.48 to +4.48)"
    assert paired([1.0]) is None
    assert interval([1.0, math.inf], 1) == "+1.0, +inf"


def test_validation_is_measured_along_a_run_and_only_where_asked(fixed: None):
    text = cast(Corpus, FixedText())
    plan = small(switch_table1.PLAN, evaluations=2)
    found = lab.train(plan, plan.arms[1], text, 0)
    assert [point["step"] for point in found["path"]] == [2, 4]
    assert found["path"][-1]["valid_bpb"] == found["valid_bpb"] != found["path"][0]["valid_bpb"]
    # Measuring changes nothing of the run.
    once = lab.train(dataclasses.replace(plan, evaluations=1), plan.arms[1], text, 0)
    assert "path" not in once
    assert (once["valid_bpb"], once["curve"]) == (found["valid_bpb"], found["curve"])


def test_places_are_computed_filled_or_not_where_step_times_are_padded(
    fixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timed: list[set[str | None]] = []

    def spy(one: Any, other: Any, rounds: int) -> dict[str, Any]:
        parts = [part for side in (one, other) for part in side.model.modules()]
        timed.append({part.backend for part in parts if isinstance(part, lab.MoELayer)})
        return {"median": 1.0, "low": 1.0, "high": 1.0}

    monkeypatch.setattr(lab, "step_time_ratio", spy)
    arm = Arm("one", "switch", 4, 1, 8, capacity=Capacity(1.5, per_token=True))
    record = lab.run_plan(small(Plan((arm,), "one", padded=True)), tmp_path, "toy")
    assert timed == [{None}, {"padded"}]
    # 16 tokens, 4 experts of ceil(1.5 * 16 / 4) = 6 places: 24 / 16 rows per token of 2 * 3 * 8 * 8 FLOPs.
    assert record["arms"]["one"]["cost"]["padded"] == 2 * 3 * 8 * 8 * 24 / 16


def test_the_cost_of_every_rule_s_arm_is_known():
    for arm in rules_compared.ARMS:
        found = lab.cost_of(rules_compared.PLAN, arm, 257)
        assert found["total_parameters"] > 0
        assert ("padded" in found) == (arm.capacity is not None)


def test_table_1_s_arms_differ_in_experts_per_token_with_their_rate_and_in_capacity_alone():
    plan = switch_table1.PLAN
    for factor in (2, 1.25, 1):
        one, two = plan.arm(f"Switch {factor:g}"), plan.arm(f"top-2 {factor:g}")
        assert differing(one, two) == {"num_selected", "learning_rate"}
        assert differing(one, plan.arm("Switch 2")) <= {"capacity"}
        costs = [lab.cost_of(plan, arm, 257) for arm in (one, two)]
        # The convention leaves K out: as many places, so as many padded FLOPs, for one and two experts.
        assert costs[0]["padded"] == costs[1]["padded"] == 2 * 3 * 64 * 256 * factor
        assert costs[0]["total_parameters"] == costs[1]["total_parameters"]
    wide = plan.arm("Switch+ 1")
    assert differing(wide, plan.arm("Switch 1")) == {"expert_width"}
    assert lab.cost_of(plan, wide, 257)["padded"] == lab.cost_of(plan, plan.arm("top-2 2"), 257)["padded"]
    # In evaluation every expert has a place for every token: nothing is dropped.
    assert {arm.capacity.places(1, 100, 16, False) for arm in plan.arms if arm.capacity} == {100}


def ways(*paths: list[float] | None, padded: float = 1.0) -> dict[str, Any]:
    """Return an arm's record: bits per byte at steps 10, 20, ... by seed; None diverged before the first."""
    seeds = []
    for own in paths:
        points = [{"step": 10 * (i + 1), "valid_bpb": value} for i, value in enumerate(own or [])]
        seeds.append({"valid_bpb": own[-1] if own else None, "path": points})
    times = {"step_time": {"median": 1.0}, "padded_step_time": {"median": padded}}
    return {"causal": True, "seeds": seeds, "active_flops": 1.0, "cost": {"padded": 2.0}} | times


def table1(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    # The twin ends highest, so 2.0 is the quality that all arms reach.
    return {"arms": {"dense": ways([3.0, 2.0], [3.0, 2.0]), "Switch 1": ours, "top-2 2": theirs}}


@pytest.mark.parametrize(
    ("ours", "theirs", "held"),
    [
        # To 2.0 from 2.5 to 1.5: half-way between steps 10 and 20, 15 steps; times 1.2 = 18 against 20.
        (ways([2.5, 1.5], [2.5, 1.5], padded=1.2), ways([2.0, 1.5], [2.0, 1.5], padded=2.0), True),
        (ways([2.5, 1.5], [2.5, 1.5], padded=1.4), ways([2.0, 1.5], [2.0, 1.5], padded=2.0), False),
        (ways([2.5, 1.5], None), ways([2.5, 1.5], [2.5, 1.5], padded=2.0), False),
        (ways([2.5, 1.5], [2.5, 1.5]), ways([2.5, 1.5], None, padded=2.0), True),
    ],
    ids=["sooner", "fewer padded FLOPs are not enough", "diverged", "the other diverged"],
)
def test_table_1_judges_time_to_a_quality_that_all_reach(
    ours: dict[str, Any], theirs: dict[str, Any], held: bool
):
    record = table1(ours, theirs)
    found = switch_table1.table1_verdict(record)
    assert found["held"] is held
    assert found["sentence"].startswith("held" if held else "did not hold")
    json.dumps(found, allow_nan=False)


def test_table_1_s_steps_and_times_by_hand():
    record = table1(ways([2.5, 1.5], [2.5, 1.5], padded=1.2), ways([2.0, 1.5], [2.0, 1.5], padded=2.0))
    assert switch_table1.thresholds(record) == [2.0, 2.0]
    assert switch_table1.steps_to(record, "Switch 1", [2.0, 1.4]) == [15, math.inf]
    found = switch_table1.table1_verdict(record)
    assert found["log_time_ratio"] == pytest.approx([math.log(20 / 18)] * 2)
    assert any("| Switch 1 |" in line and "| 18, 18 | 15, 15 | 2 |" in line for line in found["table"])
    # An arm that ends higher than the twin moves the threshold, not the arm out of the table.
    record["arms"]["Switch 1"] = ways([2.5, 2.25], [2.5, 1.5])
    assert switch_table1.thresholds(record) == [2.25, 2.0]
    assert switch_table1.steps_to(record, "dense", [2.25, 2.0]) == [17.5, 20]


def test_a_table_of_the_verdict_stands_on_the_page(fixed: None, tmp_path: Path):
    arms = tuple(map(switch_table1.PLAN.arm, ("dense", "Switch 1", "top-2 2")))
    plan = small(switch_table1.PLAN, evaluations=2, arms=arms)
    record = lab.run_plan(plan, tmp_path, "toy")
    record |= {"target": "switch/table1", "claim": "c", "quick": True, "created": "today"}
    record |= {"environment": WHERE, "verdict": switch_table1.table1_verdict(record)}
    page = lab_page(record, "Toy")
    assert "Threshold: the highest final bits per byte" in page
    assert page.count("| top-2 2 |") == 2
    json.dumps(record, allow_nan=False)
    # What is kept or recorded of older arms and plans names none of the later fields.
    # A plan always had a rate; an arm's own came later.
    assert set(lab._shared(Plan((), ""))) & set(lab._LATER) == {"learning_rate"}
    assert set(lab._plain(lab.Arm("a"))) & set(lab._LATER) == set()
    assert record["plan"]["padded"] is True
