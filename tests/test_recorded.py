"""The recorded results: complete, in agreement with the code's defaults, and expected beforehand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gatewright.experiments import (
    RaceRun,
    balance,
    bias_balance,
    deep_figures,
    few_experts,
    granularity,
    hme_table1,
    int8_bits,
    lab,
    local_ensemble,
    local_figures,
    local_table1,
    rules_compared,
    switch_drops,
    switch_figure1,
    switch_slots,
    switch_table1,
    switch_table2,
    switch_table3,
)
from gatewright.experiments.quickstart import PLANS
from gatewright.experiments.sweep import best_rate
from gatewright.experiments.vowel_runs import best_rate as best_rate_of_runs

ROOT = Path(__file__).resolve().parents[1] / "reproductions"
RECORDED = sorted(p.stem for p in ROOT.glob("race-*.json") if p.stem.replace("-", "/", 1) in PLANS)


def read(name: str) -> Any:
    return json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))


def test_the_quickstart_is_recorded() -> None:
    assert "race-quickstart" in RECORDED


@pytest.mark.parametrize("name", RECORDED)
def test_every_result_was_expected_beforehand_and_has_its_page(name: str) -> None:
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    first, _, second = name.partition("-")
    assert set(expected[first][second]) == {"metric", "sign", "least_effect"}
    assert read(name)["race"]["verdict"]["sentence"] in (ROOT / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECORDED)
def test_every_seed_of_the_plan_is_there(name: str) -> None:
    plan = PLANS[name.replace("-", "/", 1)]
    record = read(name)
    seeds = [run["seed"] for run in record["race"]["runs"]]
    assert seeds == list(range(plan.race.seeds))
    assert [c["seed"] for c in record["race"]["comparisons"]] == seeds
    for run in record["race"]["runs"]:
        for side in run["sides"]:
            assert side["steps"] * record["race"]["data"]["batch_tokens"] == side["final"]["tokens"]
            assert side["curve"][-1]["step"] == side["steps"]


@pytest.mark.parametrize("name", RECORDED)
def test_both_sides_swept_the_same_rates_and_took_the_best(name: str) -> None:
    record = read(name)
    entries = record["sweep"]["entries"]
    rates = {kind: {e["learning_rate"] for e in entries if e["kind"] == kind} for kind in ("dense", "sparse")}
    assert rates["dense"] == rates["sparse"]
    assert len(rates["dense"]) >= 4
    for side in record["race"]["runs"][0]["sides"]:
        assert side["learning_rate"] == best_rate(entries, side["kind"])


def test_the_defaults_of_the_command_are_the_recorded_best_rates() -> None:
    entries = read("race-quickstart")["sweep"]["entries"]
    assert RaceRun().dense_rate == best_rate(entries, "dense")
    assert RaceRun().sparse_rate == best_rate(entries, "sparse")


def test_the_verdict_of_the_quickstart_follows_from_its_numbers() -> None:
    race = read("race-quickstart")["race"]
    gaps = []
    for run in race["runs"]:
        final = {side["kind"]: side["final"]["valid_bpb"] for side in run["sides"]}
        gaps.append(final["dense"] - final["sparse"])
    spread = max(gaps) - min(gaps)
    assert race["verdict"]["gap_mean"] == pytest.approx(statistics.fmean(gaps))
    assert race["verdict"]["held"] == (statistics.fmean(gaps) > spread and min(gaps) >= 0)
    assert race["data"]["eval_bytes"] >= 250_000


ARMS = {
    "switch-balance": (balance.PLAN, balance._verdict),
    "routers-compare": (rules_compared.PLAN, rules_compared._verdict),
    "deepseek_v3-bias": (bias_balance.PLAN, bias_balance.bias_verdict),
    "olmoe-granularity": (granularity.GRANULARITY, granularity.granularity_verdict),
    "olmoe-shared": (granularity.SHARED, granularity.shared_verdict),
    "deepseek_moe-ablation": (granularity.ABLATION, granularity.ablation_verdict),
    "switch-appendix-d": (few_experts.PLAN, few_experts.few_verdict),
}


def recorded(names: Iterable[str]) -> list[str]:
    return [name for name in names if (ROOT / f"{name}.json").is_file()]


@pytest.mark.parametrize("name", recorded(ARMS))
def test_every_arm_and_seed_of_a_comparison_is_recorded_as_it_is_planned(name: str) -> None:
    record, (plan, _) = read(name), ARMS[name]
    assert set(record["arms"]) == {arm.name for arm in plan.arms}
    assert record["plan"] == lab._shared(plan)
    for arm in plan.arms:
        held = record["arms"][arm.name]
        assert [own["seed"] for own in held["seeds"]] == list(plan.seeds)
        assert {key: held[key] for key in lab._plain(arm)} == lab._plain(arm)
        assert len(held["step_time"]["raw_ms"]) == plan.timing_rounds
    assert not record["quick"]


@pytest.mark.parametrize("name", recorded(ARMS))
def test_a_comparison_s_verdict_follows_from_its_numbers(name: str) -> None:
    record, (_, verdict) = read(name), ARMS[name]
    assert json.loads(json.dumps(verdict(record))) == record["verdict"]
    page = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    assert record["verdict"]["sentence"] in page
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    first, _, second = name.partition("-")
    assert set(expected[first][second]) == {"metric", "sign", "least_effect"}


SWITCH = {
    "switch-table1": (switch_table1.PLAN, switch_table1.table1_verdict),
    "switch-table2": (switch_table2.PLAN, switch_table2.recorded_verdict),
    "switch-table3": (switch_table3.PLAN, switch_table3.table3_verdict),
    "switch-drops": (switch_drops.PLAN, switch_drops.drops_verdict),
    "switch-figure1": (switch_figure1.PLAN, switch_figure1.figure1_verdict),
}


@pytest.mark.parametrize("name", recorded(SWITCH))
def test_the_switch_tables_that_are_recorded_are_as_planned_and_their_verdicts_follow(name: str) -> None:
    record, (plan, verdict) = read(name), SWITCH[name]
    assert record["plan"] == lab._shared(plan)
    assert set(record["arms"]) == {arm.name for arm in plan.arms}
    for arm in plan.arms:
        held = record["arms"][arm.name]
        assert [own["seed"] for own in held["seeds"]] == list(plan.seeds)
        assert {key: held[key] for key in lab._plain(arm)} == lab._plain(arm)
    assert json.loads(json.dumps(verdict(record))) == record["verdict"]
    assert record["verdict"]["sentence"] in (ROOT / f"{name}.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["switch"][name.removeprefix("switch-")]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]


def test_the_places_of_one_batch_are_recorded_and_their_sentence_follows() -> None:
    record = read("switch-slots")
    assert [own["factor"] for own in record["factors"]] == list(switch_slots.FACTORS)
    assert record["steps"] == switch_slots.PLAN.steps
    assert switch_slots.slots_verdict(record) == record["verdict"]
    assert switch_slots.slots_page(record) == (ROOT / "switch-slots.md").read_text(encoding="utf-8")
    assert not record["quick"]


def test_table_1_of_1991_is_recorded_in_full_and_its_verdict_follows() -> None:
    record, plan = read("local_experts-table1"), local_table1.PLAN
    assert record["plan"] == json.loads(json.dumps(dataclasses.asdict(plan)))
    assert list(record["readings"]) == list(plan.readings)
    for reading in record["readings"].values():
        assert list(reading["systems"]) == list(local_table1.PAPER)
        for own in reading["systems"].values():
            assert own["rate"] == best_rate_of_runs(own["search"], plan.rates)
            assert own["rate"] is None or own["runs"]["seeds"] == list(range(plan.seeds))
            assert own["rate"] is None or set(own["runs"]["rates"]) == {own["rate"]}
    assert json.loads(json.dumps(local_table1.verdict(record))) == record["verdict"]
    assert record["verdict"]["sentence"] in (ROOT / "local_experts-table1.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["local_experts"]["table1"]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]


@pytest.mark.parametrize(("name", "plan"), [("figure2", 4), ("figure3", 8)])
def test_the_figures_of_1991_are_recorded_and_their_verdicts_follow(name: str, plan: int) -> None:
    record = read(f"local_experts-{name}")
    assert record["plan"] == json.loads(json.dumps(dataclasses.asdict(local_figures.Figure(plan))))
    assert [run["seed"] for run in record["runs"]] == record["plan"]["seeds"]
    assert local_figures.verdict(record, paths=name == "figure3") == record["verdict"]
    page = (ROOT / f"local_experts-{name}.md").read_text(encoding="utf-8")
    assert record["verdict"]["sentence"] in page
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["local_experts"][name]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]


def test_the_ensembles_are_recorded_and_their_verdict_follows() -> None:
    record = read("local_experts-ensemble")
    assert record["plan"] == dataclasses.asdict(local_ensemble.PLAN)
    assert list(record["systems"]) == list(local_ensemble.ARMS)
    for name, arm in local_ensemble.ARMS.items():
        own = json.loads(json.dumps(dataclasses.asdict(arm)))
        assert {key: record["systems"][name][key] for key in own} == own
        assert len(record["systems"][name]["test_error"]) == local_ensemble.PLAN.seeds
    assert local_ensemble.verdict(record) == record["verdict"]
    page = (ROOT / "local_experts-ensemble.md").read_text(encoding="utf-8")
    assert record["verdict"]["sentence"] in page
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["local_experts"]["ensemble"]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]


def test_experts_in_int8_are_recorded_and_their_verdict_follows() -> None:
    record = read("race-int8")
    assert [seed["seed"] for seed in record["seeds"]] == [0, 1, 2]
    assert int8_bits.verdict(record) == record["verdict"]
    page = (ROOT / "race-int8.md").read_text(encoding="utf-8")
    assert int8_bits.int8_page(record) == page
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["race"]["int8"]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]


def test_figure_2_of_2013_is_recorded_and_its_verdict_follows() -> None:
    record = read("deep_moe-figure2")
    assert record["plan"] == json.loads(json.dumps(dataclasses.asdict(deep_figures.PLAN)))
    assert deep_figures.figure2_verdict(record) == record["verdict"]
    assert record["verdict"]["sentence"] in (ROOT / "deep_moe-figure2.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["deep_moe"]["figure2"]) == {"metric", "sign", "least_effect"}


def test_table_1_of_1994_is_recorded_and_its_verdict_follows() -> None:
    record, plan = read("hme-table1"), hme_table1.PLAN
    assert record["plan"] == json.loads(json.dumps(dataclasses.asdict(plan)))
    assert set(record["systems"]) == set(hme_table1.PAPER)
    for name, own in record["systems"].items():
        alone = name in ("linear", "CART")
        assert [run["seed"] for run in own["runs"]] == ([0] if alone else list(plan.seeds))
        assert json.loads(json.dumps(hme_table1.summary(own["runs"]))) == own["summary"]
    for run in record["systems"]["exact EM"]["runs"]:
        told = run["log_likelihood"]
        assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(told))
    assert json.loads(json.dumps(hme_table1.verdict(record))) == record["verdict"]
    assert record["verdict"]["sentence"] in (ROOT / "hme-table1.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    assert set(expected["hme"]["table1"]) == {"metric", "sign", "least_effect"}
    assert not record["quick"]
