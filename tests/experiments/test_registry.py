"""Reproductions by name: sweep, race, result file and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.errors import UserError
from gatewright.experiments import RaceRun, registry
from gatewright.experiments.quickstart import RacePlan, run_plan
from gatewright.experiments.registry import reproduce
from gatewright.papers.mixtral import Settings
from tests.training.runs import LOOP, TINY, write_text

# The middle rate has to win, so that the list is long enough for the rule of best_rate.
RATES = (1e-7, 1e-2, 30.0)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RacePlan:
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    data = tuple(write_text(tmp_path / "text"))
    race = RaceRun(model=Settings(**TINY), data=data, tokens=2560, seeds=2, fraction=0.5, **LOOP)
    made = RacePlan("race/tiny", race, "a tiny claim", RATES)
    monkeypatch.setitem(registry.TARGETS, "race/tiny", registry._race_target(made))
    return made


def test_the_full_form_sweeps_races_every_seed_and_writes_its_page(plan: RacePlan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = reproduce("race/tiny", out=out, work=tmp_path / "work" / "race-tiny")
    record = json.loads((out / "race-tiny.json").read_text())
    assert len(record["sweep"]["entries"]) == 2 * len(RATES)
    assert [run["seed"] for run in record["race"]["runs"]] == [0, 1]
    for run in record["race"]["runs"]:
        assert [side["learning_rate"] for side in run["sides"]] == [1e-2, 1e-2]
        assert all("train_log" not in side and side["curve"] for side in run["sides"])
    page = (out / "race-tiny.md").read_text()
    assert record["race"]["verdict"]["sentence"] in page
    assert done.sentence == record["race"]["verdict"]["sentence"]
    assert all(f"{c['gap_bpb']:+.4f}" in page for c in record["race"]["comparisons"])
    assert all(Path(file).exists() for file in done.files)
    # A second call finds everything done: the numbers are the same.
    reproduce("race/tiny", out=out, work=tmp_path / "work" / "race-tiny")
    again = json.loads((out / "race-tiny.json").read_text())
    assert again["race"]["comparisons"] == record["race"]["comparisons"]


def test_the_quick_form_is_shorter_and_keeps_the_record(plan: RacePlan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reproduce("race/tiny", quick=True, out=out, work=tmp_path / "quick")
    record = json.loads((out / "race-tiny-quick.json").read_text())
    assert not (out / "race-tiny.json").exists()
    assert record["sweep"] is None
    assert record["race"]["runs"][0]["sides"][0]["final"]["tokens"] == plan.race.tokens // 8


def test_a_plan_without_rates_takes_those_of_another(plan: RacePlan, tmp_path: Path) -> None:
    longer = RacePlan("race/longer", plan.race, "longer", sweep_of=plan)
    record = run_plan(longer, tmp_path / "work" / "race-longer", quick=False)
    assert (tmp_path / "work" / "race-tiny" / "sweep.json").exists()
    assert {e["learning_rate"] for e in record["sweep"]["entries"]} == set(RATES)


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'race/quickstart'"):
        reproduce("race/quickstrat")
