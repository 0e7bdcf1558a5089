"""Experts in int8: whose runs are evaluated, what is kept, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gatewright.experiments import int8_bits
from gatewright.experiments.int8_bits import run_int8, verdict
from gatewright.training.evaluate import EvalResult, EvalRun


@pytest.mark.parametrize(("int8", "held"), [([1.0009, 2.0], True), ([1.0, 2.0011], False)])
def test_the_worst_seed_decides(int8: list[float], held: bool):
    seeds = [
        {"as_trained": {"all": plain}, "int8": {"all": own}}
        for plain, own in zip([1.0, 2.0], int8, strict=True)
    ]
    assert verdict({"seeds": seeds})["held"] == held


def test_the_quickstarts_sparse_runs_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    race = tmp_path / "race-quickstart"
    asked: list[tuple[str, bool]] = []

    def ready(plan: Any, work: Path, quick: bool) -> dict[str, Any]:
        assert (plan.name, work, quick) == ("race/quickstart", race, False)
        return {"race": {"runs": [{"seed": 0}, {"seed": 1}]}}

    def evaluated(out: Path, options: EvalRun) -> EvalResult:
        asked.append((str(out.relative_to(race)), options.int8_experts))
        bits = 1.5 + 0.0004 * options.int8_experts
        return EvalResult(str(out), 8, bits, {"code": bits}, 1000)

    for seed in (0, 1):
        (race / "race" / f"seed{seed}" / "sparse").mkdir(parents=True)
        (race / "race" / f"seed{seed}" / "sparse" / "run.toml").write_text(f"seed = {seed}\n")
    monkeypatch.setattr(int8_bits, "run_plan", ready)
    monkeypatch.setattr(int8_bits, "evaluate_run", evaluated)
    record, page, _ = run_int8(tmp_path / "race-int8", False)
    assert asked == [(f"race/seed{seed}/sparse", on) for seed in (0, 1) for on in (False, True)]
    assert "held: experts in int8 cost at most 0.00040 bits per byte over 2 seeds" in page
    assert "| 1 | int8 | 1.50040 | 1.50040 |" in page
    assert run_int8(tmp_path / "race-int8", False)[0]["seeds"] == record["seeds"]
    assert len(asked) == 4
