"""Sweeps of the rate that arms share: every arm at every rate, with its own rate, and what follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from gatewright.experiments import lab, rates
from gatewright.experiments.rates import RATES, SEED, SWEPT, rates_of, rates_verdict


def test_every_arm_has_every_rate_and_nothing_is_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, float, int]] = []

    def train(plan: lab.Plan, arm: lab.Arm, corpus: Any, seed: int) -> dict[str, Any]:
        asked.append((arm.name, plan.learning_rate, seed))
        assert plan.steps == 128
        assert arm.learning_rate is None
        return {"valid_bpb": 2.0 + len(asked) / 100}

    monkeypatch.setattr(rates, "train", train)
    record, page, pictures = rates.run_rates("switch/rates", tmp_path, True)
    wanted = rates_of("switch/rates")
    assert asked == [(name, rate, SEED) for rate in wanted for name in SWEPT["switch/rates"][1]]
    assert SEED not in SWEPT["switch/rates"][0].seeds
    again, _, _ = rates.run_rates("switch/rates", tmp_path, True)
    assert len(asked) == 20
    assert again["arms"] == record["arms"]
    assert [own["learning_rate"] for own in record["arms"]["top-2 2"]] == [*RATES, 0.024]
    dense = [own["valid_bpb"] for own in record["arms"]["dense"]]
    assert dense == pytest.approx([2.01, 2.05, 2.09, 2.13, 2.17])
    assert "| dense | 2.0100 | 2.0500 | 2.0900 | 2.1300 | 2.1700 |" in page
    assert pictures == {}


def record_of(dense: list[float | None], sparse: list[float | None]) -> dict[str, Any]:
    arms = {
        name: [{"learning_rate": rate, "valid_bpb": value} for rate, value in zip(RATES, values, strict=True)]
        for name, values in (("dense", dense), ("sparse", sparse))
    }
    return {"arms": arms, "baseline": "dense", "shared": 3e-3}


def test_the_gap_is_taken_at_the_shared_rate_and_at_each_side_s_own_best():
    record = record_of([2.5, 2.4, 2.3, 2.6], [2.6, 2.35, 2.36, None])
    found = rates_verdict(copy.deepcopy(record))
    assert found["best"] == {"dense": 6e-3, "sparse": 3e-3}
    assert found["gaps"]["sparse"] == pytest.approx({"shared": 0.05, "own": -0.05})
    assert not found["held"]
    assert "end of the list" not in found["sentence"]
    record["arms"]["sparse"][2]["valid_bpb"] = 2.2
    found = rates_verdict(record)
    assert found["held"]
    assert found["gaps"]["sparse"]["own"] == pytest.approx(0.1)
    low = rates_verdict(record_of([2.5, 2.4, 2.3, 2.2], [2.1, 2.2, 2.3, 2.4]))
    assert low["sentence"].endswith("the best rate of dense, sparse is at the end of the list")
    lost = rates_verdict(record_of([2.5, 2.4, 2.3, 2.2], [2.1, None, 2.3, 2.4]))
    assert (lost["held"], lost["sentence"]) == (False, "did not hold: sparse diverged at the shared rate")
