"""Recorded results of the papers' own small models: whole, as planned, expected; verdict and page follow."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gatewright.experiments import (
    balance_scope,
    deepseek_mtp,
    distill_rates,
    distill_tables,
    few_experts,
    finetune_tables,
    gshard_rates,
    gshard_runs,
    lab,
    mixtral_passkey,
    mixtral_routing,
    olmoe_dense,
    olmoe_stability,
    rates,
    switch_figure1,
    switch_table1,
    trials,
    tuning_rates,
)
from gatewright.experiments.trial_pages import trial_page

ROOT = Path(__file__).resolve().parents[1] / "reproductions"
COURSES = {
    "olmoe-dense": (olmoe_dense.COURSE, olmoe_dense.dense_verdict),
    "olmoe-stability": (olmoe_stability.COURSE, olmoe_stability.stability_verdict),
    "mixtral-routing": (mixtral_routing.COURSE, mixtral_routing.routing_verdict),
    "mixtral-passkey": (mixtral_passkey.COURSE, mixtral_passkey.passkey_verdict),
    "deepseek_v3-mtp": (deepseek_mtp.COURSE, deepseek_mtp.mtp_verdict),
    "deepseek_v3-scope": (balance_scope.COURSE, balance_scope.scope_verdict),
}


@pytest.mark.parametrize("name", [name for name in COURSES if (ROOT / f"{name}.json").is_file()])
def test_every_arm_and_seed_is_recorded_and_verdict_and_page_follow(name: str) -> None:
    course, verdict = COURSES[name]
    record = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
    assert record["target"] == name.replace("-", "/", 1)
    assert not record["quick"]
    assert record["plan"] == trials._shared(course)
    assert list(record["arms"]) == [trial.name for trial in course.trials]
    for trial in course.trials:
        held = record["arms"][trial.name]
        assert [own["seed"] for own in held["seeds"]] == list(course.seeds)
        assert {key: held[key] for key in trials._told(trial)} == trials._told(trial)
        assert len(held["step_time"]["raw_ms"]) == course.timing_rounds
    assert json.loads(json.dumps(verdict(record))) == record["verdict"]
    page = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    title, pictures = page.splitlines()[0].removeprefix("# "), re.findall(r"^!\[(.+?)\]", page, re.MULTILINE)
    assert trial_page(record, title, pictures) == page
    for picture in pictures:
        assert (ROOT / f"{name}-{picture}.png").is_file()
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    first, _, second = name.partition("-")
    assert set(expected[first][second]) == {"metric", "sign", "least_effect"}


OTHER_SWEEPS: dict[str, tuple[tuple[str, ...], tuple[float, ...], Any]] = {
    "gshard/rates": (gshard_rates.NAMES, rates.RATES, gshard_rates.course_of(gshard_runs.PLAN)),
    "switch/text-rates": (
        tuple(tuning_rates.KINDS),
        rates.rates_of(tuning_rates.TEXT_TARGET),
        tuning_rates.course_of(finetune_tables.TABLE4),
    ),
    "switch/tuning-rates": (
        tuple(tuning_rates.SIDES),
        tuning_rates.RATES,
        tuning_rates.course_of(tuning_rates.SWEPT),
    ),
    "switch/distill-rates": (
        (distill_rates.DENSE, distill_rates.TEACHER),
        rates.rates_of(distill_rates.TARGET),
        distill_rates.course_of(distill_tables.TABLE6),
    ),
}


def recorded_sweep(target: str) -> Any:
    """Return a recorded sweep whose verdict and page follow from it, and whose expectation is written."""
    name = target.replace("/", "-")
    record = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
    assert record["target"] == target
    assert not record["quick"]
    assert record["seed"] == rates.SEED
    assert json.loads(json.dumps(rates.rates_verdict(record))) == record["verdict"]
    assert rates.rates_page(record) == (ROOT / f"{name}.md").read_text(encoding="utf-8")
    expected = tomllib.loads((ROOT / "expected.toml").read_text(encoding="utf-8"))
    first, _, second = target.partition("/")
    assert set(expected[first][second]) == {"metric", "sign", "least_effect"}
    return record


@pytest.mark.parametrize(
    "target", [t for t in rates.SWEPT if (ROOT / f"{t.replace('/', '-')}.json").is_file()]
)
def test_every_rate_of_a_sweep_is_recorded_and_verdict_and_page_follow(target: str) -> None:
    plan, names, _ = rates.SWEPT[target]
    record = recorded_sweep(target)
    assert record["plan"] == lab._shared(dataclasses.replace(plan, seeds=(rates.SEED,), evaluations=1))
    assert list(record["arms"]) == list(names)
    for own in record["arms"].values():
        assert [one["learning_rate"] for one in own] == list(rates.rates_of(target))


@pytest.mark.parametrize(
    "target", [t for t in OTHER_SWEEPS if (ROOT / f"{t.replace('/', '-')}.json").is_file()]
)
def test_every_rate_of_a_sweep_of_the_papers_own_runs_is_recorded(target: str) -> None:
    names, wanted, course = OTHER_SWEEPS[target]
    record = recorded_sweep(target)
    assert record["plan"] == course
    assert list(record["arms"]) == list(names)
    for own in record["arms"].values():
        assert [one["learning_rate"] for one in own] == list(wanted)


def test_arms_take_the_best_rates_of_the_recorded_sweep() -> None:
    best = json.loads((ROOT / "switch-rates.json").read_text(encoding="utf-8"))["verdict"]["best"]
    kinds = {"dense": "dense", "Switch": "Switch 1.25", "Switch+": "Switch 1.25", "top-2": "top-2 2"}
    for arm in switch_table1.PLAN.arms:
        assert arm.learning_rate == best[kinds[arm.name.partition(" ")[0]]]
    for plan in (switch_figure1.PLAN, few_experts.PLAN):
        for arm in plan.arms:
            kind = "dense" if arm.name == plan.baseline else "Switch 1.25"
            assert arm.learning_rate == best[kind]
    assert best["Switch 1.25"] == best["64 experts"]


@pytest.mark.skipif(not (ROOT / "gshard-rates.json").is_file(), reason="not recorded yet")
def test_translation_s_systems_take_the_best_rates_of_the_recorded_sweep() -> None:
    best = json.loads((ROOT / "gshard-rates.json").read_text(encoding="utf-8"))["verdict"]["best"]
    for system in gshard_runs.SYSTEMS:
        rate = gshard_runs.PLAN.learning_rate if system.learning_rate is None else system.learning_rate
        assert rate == best[gshard_runs.SPARSE if system.num_experts else gshard_runs.TWIN]


def test_fine_tunings_take_the_best_rates_of_the_recorded_sweeps() -> None:
    def best(name: str) -> set[float]:
        verdict = json.loads((ROOT / f"switch-{name}.json").read_text(encoding="utf-8"))["verdict"]
        return set(verdict["best"].values())

    for plan in (finetune_tables.TABLE4, finetune_tables.TABLE8):
        assert best("text-rates") == {plan.pretraining_rate}
        assert best("tuning-rates") == {plan.learning_rate}
        assert plan.dense_pretraining_rate is None
        assert all(side.learning_rate is None for side in plan.sides)


def test_distillations_take_the_dense_model_s_best_rate_which_is_about_the_teacher_s() -> None:
    sweep = json.loads((ROOT / "switch-distill-rates.json").read_text(encoding="utf-8"))
    for table in (distill_tables.TABLE6, distill_tables.TABLE7):
        assert table.learning_rate == sweep["verdict"]["best"]["dense"]
        assert table.teacher_rate is None
    # The teacher's is the next one, where it gains less than runs differ.
    teacher = {own["learning_rate"]: own["valid_bpb"] for own in sweep["arms"]["64 experts"]}
    assert abs(teacher[distill_tables.TABLE6.learning_rate] - min(teacher.values())) < 1e-3
