"""deep_moe's reproductions: verdicts follow from the numbers, pages show every run, stopped ones go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.data.sources import package_folder
from gatewright.experiments import deep_figures, deep_runs, deep_table1, deep_table2, registry
from gatewright.experiments.deep_figures import (
    Maps,
    collapse_verdict,
    figure2_verdict,
    run_collapse,
    run_figure2,
    tells,
)
from gatewright.experiments.deep_pages import block
from gatewright.experiments.deep_runs import Recipe
from gatewright.experiments.deep_table1 import ONE_LAYER, Table1, run_table1, settings_of
from gatewright.experiments.deep_table2 import Table2, pairs, run_table2
from gatewright.experiments.registry import reproduce

needs_digits = pytest.mark.skipif(package_folder("sklearn") is None, reason="scikit-learn is not installed")
SHORT = Recipe(1, 1, batch=250)
TINY = Maps("digits", "", seeds=2, recipe=SHORT)


def toy_gates(first: str, second: str) -> dict[str, Any]:
    """Return sums of gates of two layers with two experts, each going by "place", "class" or nothing."""

    def one(by: str) -> tuple[Any, Any]:
        flat_place, flat_class = [[5.0, 5.0]] * 4, [[10.0, 10.0]] * 2
        if by == "place":
            return [[10.0, 0.0], [10.0, 0.0], [0.0, 10.0], [0.0, 10.0]], flat_class
        return (flat_place, [[20.0, 0.0], [0.0, 20.0]]) if by == "class" else (flat_place, flat_class)

    both = one(first), one(second)
    return {
        "place": [own[0] for own in both],
        "label": [own[1] for own in both],
        "joint": [[10.0, 10.0], [10.0, 10.0]],
    }


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("place", "class", (True, True)),
        ("class", "place", (False, False)),
        ("place", "place", (True, False)),
        ("none", "class", (False, True)),
    ],
)
def test_what_a_layer_goes_by_is_told_from_its_gates(first: str, second: str, found: tuple[bool, bool]):
    layers = tells(toy_gates(first, second))
    assert deep_figures.factored(layers) == found
    assert [own["effective"] for own in layers] == pytest.approx([2, 2])
    assert layers[0]["shared"] == pytest.approx(0)
    if first == "place":
        assert layers[0]["known"] == pytest.approx({"place": 1, "class": 0})


@pytest.mark.parametrize(("good", "held"), [(5, True), (4, True), (3, False)])
def test_figure2_asks_for_four_of_five_seeds(good: int, held: bool):
    runs = [{"tells": tells(toy_gates("place", "class"))}] * good
    runs += [{"tells": tells(toy_gates("place", "none"))}] * (5 - good)
    found = figure2_verdict({"runs": runs})
    assert (found["held"], found["both"]) == (held, good)
    assert f"{good} of 5 seeds, the first alone in 5, the second alone in {good}" in found["sentence"]
    assert not figure2_verdict({"runs": runs[:1]})["held"]


@pytest.mark.parametrize(
    ("with_it", "without", "held"),
    [
        ([3.9, 3.8, 3.7, 3.6, 2.0], [3.0, 3.0, 2.0, 2.0, 1.0], True),
        ([3.9, 3.8, 3.7, 2.9, 2.0], [2.0] * 5, False),
        ([3.9] * 5, [3.5] * 5, False),
        ([3.5] * 5, [1.0, 1.0, 1.0, 3.6, 3.6], False),
    ],
)
def test_collapse_asks_for_both_sides(with_it: list[float], without: list[float], held: bool):
    arms = {"a": with_it, "b": without}
    record = {"runs_by_arm": {name: [{"left": [4.0, v]} for v in own] for name, own in arms.items()}}
    assert collapse_verdict(record)["held"] == held


def errors(single: float, mixture: float, concat: float, plain: float | None = None) -> dict[str, Any]:
    """Return the arms of a size with these errors in test, and half of them in training."""
    arms = {"single": single, "mixture": mixture, "concat": concat} | ({"plain": plain} if plain else {})
    return {
        arm: [{"test_error": v + d, "train_error": v / 2 + d} for d in (-0.1, 0.1)] for arm, v in arms.items()
    }


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"d": errors(2.0, 2.1, 1.0, 2.0)}, True),
        ({"d": errors(2.0, 2.1, 1.0, 2.0), "c": errors(2.0, 1.5, 1.6, 1.5)}, False),
        ({ONE_LAYER: errors(2.0, 1.7, 1.5)}, False),
        ({"d": errors(2.0, 1.5, 1.0, 9.0)}, False),
    ],
)
def test_table1_asks_for_order_one_layer_and_plain_net(changes: dict[str, Any], held: bool):
    sizes = {name: errors(2.0, 1.5, 1.0, 1.5) for name in "abcd"} | {ONE_LAYER: errors(3.0, 2.0, 1.9)}
    assert deep_table1.verdict(sizes | changes)["held"] == held


def test_pairs_that_are_independent_and_pairs_that_are_not():
    independent = pairs([[2.0, 4.0], [1.0, 2.0]])
    assert (independent["shared"], independent["farthest"]) == pytest.approx((0, 0), abs=1e-9)
    tied = pairs([[6.0, 0.0], [0.0, 2.0]])
    # The second row is all on the second expert, which has a quarter of everything: 3/4 away.
    assert (tied["shared"], tied["farthest"]) == pytest.approx((1, 0.75))
    for values, ordered, held in (
        ([0.01] * 4 + [0.5], True, True),
        ([0.01] * 3 + [0.5] * 2, True, False),
        ([0.0] * 5, False, False),
    ):
        arms = errors(2.0, 1.5 if ordered else 2.5, 1.0)
        arms["mixture"] = [{**arms["mixture"][0], "pairs": {"shared": value}} for value in values]
        assert deep_table2.verdict({deep_table2.TWO: arms})["held"] == held


def test_quick_forms_and_arms():
    assert [deep_table1.arms_of(size)[-1] for size in deep_table1.PAPER] == ["plain"] * 4 + ["concat"]
    for size in deep_table1.PAPER:
        made = [settings_of(size, arm, 256, 9.0) for arm in deep_table1.arms_of(size)]
        assert {own.width for own in made} == {256}
        assert {own.margin for own in made} == {9.0}
    assert set(deep_table1.QUICK.sizes) < set(deep_table1.PLAN.sizes)
    assert deep_figures.PLAN.seeds >= 5


@needs_digits
def test_figures_show_every_seed_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deep_runs, "MAPPED", 20)
    record, page, pictures = run_figure2(tmp_path / "a", False, TINY)
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert all(f"| {seed} | " in page for seed in (0, 1))
    assert record["verdict"]["sentence"] in page
    assert pictures["maps"].stat().st_size > 1000
    collapse, page, pictures = run_collapse(tmp_path / "b", False, TINY)
    free = collapse["runs_by_arm"]["no constraint"]
    assert len(free[0]["curve"]) == 2
    assert (
        f"| no constraint, seed 1 | {', '.join(f'{v:.2f}' for v in free[1]['curve'][0]['effective'])} |"
        in page
    )
    # The constraint holds every expert at an even share in the first phase of training.
    held = collapse["runs_by_arm"]["constraint, then none"][0]
    assert min(held["curve"][0]["effective"]) > 3.5
    assert pictures["experts"].stat().st_size > 1000

    def never(*_: Any) -> None:
        raise AssertionError("a run that was kept is run again")

    monkeypatch.setattr(deep_runs, "_run", never)
    again, _, _ = run_figure2(tmp_path / "a", False, TINY)
    assert again["runs"] == record["runs"]


@needs_digits
def test_table1_is_written_with_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = ("deep-moe-50-20-gates-20-20", ONE_LAYER)

    monkeypatch.setattr(deep_runs, "MAPPED", 20)

    def run(work: Path, quick: bool) -> Any:
        return run_table1(work, quick, Table1("digits", sizes, 2, Recipe(1, 0, batch=500), 256))

    target = registry.Target("deep_moe/table1", "a claim", run)
    monkeypatch.setitem(registry.TARGETS, "deep_moe/table1", target)
    done = reproduce("deep_moe/table1", out=tmp_path / "out", work=tmp_path / "work")
    record = json.loads((tmp_path / "out" / "deep_moe-table1.json").read_text())
    page = (tmp_path / "out" / "deep_moe-table1.md").read_text()
    assert done.sentence in page
    assert [list(own) for own in record["sizes"].values()] == [
        list(deep_table1.ARMS),
        list(deep_table1.ARMS[:3]),
    ]
    for own in record["sizes"][sizes[0]].values():
        assert [run["seed"] for run in own] == [0, 1]
        assert f"{own[0]['parameters']:,}" in page
    assert "(1.77)" in page
    assert "(1.41)" in page
    assert (tmp_path / "out" / "deep_moe-table1-errors.png").stat().st_size > 1000
    shown = block(record, "deep_moe-table1.json")
    assert record["verdict"]["sentence"] in shown
    assert "reproductions/deep_moe-table1.json" in shown


def test_table2_on_the_vowels(tmp_path: Path):
    pytest.importorskip("parselmouth", reason="praat-parselmouth is not installed")
    record, page, pictures = run_table2(tmp_path, False, Table2(seeds=2, recipe=Recipe(1, 1, batch=100)))
    own = record["sizes"]["deep-moe-speech"]
    assert [len(own["mixture"][0]["pairs"]["joint"]), len(own["mixture"][0]["pairs"]["joint"][0])] == [4, 16]
    assert torch.tensor(own["mixture"][0]["pairs"]["joint"]).sum() == pytest.approx(25 * 12, rel=1e-3)
    assert "pairs" not in own["concat"][0]
    assert all(0 < run["test_error"] <= 100 for runs in own.values() for run in runs)
    assert f"| 1 | {own['mixture'][1]['pairs']['shared']:.3f} |" in page
    assert "(55.0)" in page
    assert pictures["pairs"].stat().st_size > 1000
