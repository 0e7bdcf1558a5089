"""The sides that a race's settings ask for, and the settings that no race can have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gatewright.errors import UserError
from gatewright.experiments.race_run import RaceRun, race_sides, with_experts
from gatewright.experiments.twin import cost_of
from gatewright.papers import mixtral, switch
from gatewright.training import LoopSettings


def sides(**changes: Any) -> dict[str, Any]:
    found = race_sides(RaceRun(**changes), changes.get("first_seed", 0))
    by_name = {side.name: side for side in found}
    assert len(by_name) == len(found)
    assert len({side.run.out for side in found}) == len(found)
    return by_name


def test_two_sides_share_everything_but_model_rate_and_budget():
    found = sides(tokens=1000, fraction=0.75, dense_rate=0.02, sparse_rate=0.01, out="there", data=("d",))
    assert list(found) == ["dense", "sparse"]
    dense, sparse = found["dense"].run, found["sparse"].run
    assert (dense.tokens, sparse.tokens) == (1000, 750)
    assert (dense.learning_rate, sparse.learning_rate) == (0.02, 0.01)
    assert (dense.out, sparse.out) == ("there/seed0/dense", "there/seed0/sparse")
    for field in dataclasses.fields(LoopSettings):
        if field.name != "model":
            assert getattr(dense, field.name) == getattr(sparse, field.name), field.name
    assert (dense.seed, sparse.seed) == (0, 0)
    assert found["dense"].against == "active"
    assert found["sparse"].label == "mixtral, 64 experts, 4 per token"


def test_seeds_change_the_weights_and_not_the_text():
    one, two = (race_sides(RaceRun(), seed) for seed in (0, 5))
    for a, b in zip(one, two, strict=True):
        assert (b.run.seed, b.run.data_seed) == (5, a.run.data_seed)
        assert b.run.out == a.run.out.replace("seed0", "seed5")


def test_the_triangle_has_both_twins():
    found = sides(triangle=True)
    assert [(side.kind, side.against) for side in found.values()] == [
        ("dense", "active"),
        ("dense", "total"),
        ("sparse", None),
    ]
    assert list(found) == ["dense-active", "dense-total", "sparse"]


def test_against_total_takes_the_twin_of_equal_size():
    found = sides(against="total")
    sizes = [cost_of("mixtral", side.run.model).total_parameters for side in found.values()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_several_sizes_have_one_twin_with_no_less_compute_than_any():
    found = sides(experts=(4, 256, 16))
    assert list(found) == ["dense", "sparse-4", "sparse-256", "sparse-16"]
    flops = {name: cost_of("mixtral", side.run.model).forward_flops_per_token for name, side in found.items()}
    assert flops["dense"] == pytest.approx(flops["sparse-256"], rel=0.01)
    assert flops["dense"] > max(flops["sparse-4"], flops["sparse-16"])
    assert found["dense"].label == "dense twin of equal FLOPs per token to 256 experts"


def test_fewer_experts_than_are_selected_are_wider_ones():
    base = mixtral.Settings(num_experts=64, num_selected=4, expert_width=64)
    few = with_experts(base, 2)
    assert (few.num_experts, few.num_selected, few.expert_width) == (2, 2, 128)
    same = with_experts(base, 4)
    assert (same.num_experts, same.num_selected, same.expert_width) == (4, 4, 64)
    with pytest.raises(
        UserError, match=r"experts 3 with an active width of 256; allowed: numbers .* divide it"
    ):
        with_experts(base, 3)
    one = with_experts(switch.Settings(expert_width=(8, 16)), 16)
    assert (one.num_experts, one.expert_width) == (16, (8, 16))


def test_shares_of_the_text_have_a_pair_of_sides_each():
    found = sides(data_fraction=(0.01, 1.0))
    assert list(found) == ["dense-data0.01", "sparse-data0.01", "dense-data1", "sparse-data1"]
    assert [side.run.data_fraction for side in found.values()] == [0.01, 0.01, 1.0, 1.0]
    assert found["sparse-data0.01"].label.endswith("on 1 % of the documents")


@pytest.mark.parametrize("paper", ["sparsely_gated", "mixtral", "switch", "olmoe"])
@pytest.mark.parametrize(
    "asked", [{}, {"triangle": True}, {"experts": (4, 8)}, {"data_fraction": (0.5, 1.0)}]
)
def test_every_wired_paper_races(paper: str, asked: dict[str, Any]):
    assert len(sides(paper=paper, **asked)) >= 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seeds": 0}, "seeds 0; allowed: 1 or more"),
        ({"tokens": -5}, "tokens -5; allowed: 1 or more"),
        ({"turn_steps": 0}, "turn_steps 0; allowed: 1 or more"),
        ({"first_seed": -1}, "first_seed -1; allowed: 0 or more"),
        ({"fraction": 0.0}, "fraction 0.0; allowed: above 0, up to 1"),
        ({"fraction": 1.5}, "fraction 1.5; allowed: above 0, up to 1"),
        ({"fraction": float("nan")}, "fraction nan; allowed: finite numbers"),
        ({"sparse_rate": 0.0}, "sparse_rate 0.0; allowed: above 0"),
        ({"dense_rate": float("inf")}, "dense_rate inf; allowed: finite numbers"),
        ({"data_fraction": (0.5, 0.0)}, "allowed: shares above 0, up to 1"),
        ({"data_fraction": (0.5, float("nan"))}, "allowed: finite numbers"),
        ({"data_fraction": (0.5, 0.5)}, "data_fraction (0.5, 0.5); allowed: each value once"),
        ({"experts": (4, 8, 4)}, "experts (4, 8, 4); allowed: each value once"),
        ({"experts": (0, 4)}, "experts (0, 4); allowed: numbers of 1 or more"),
        ({"experts": (4,), "data_fraction": (0.5,)}, "--experts and --data-fraction together; allowed: one"),
        ({"triangle": True, "experts": (4, 8)}, "--triangle and --experts together; allowed: one of them"),
        (
            {"triangle": True, "data_fraction": (0.5,)},
            "--triangle and --data-fraction together; allowed: one",
        ),
    ],
)
def test_settings_that_no_race_can_have(changes: dict[str, Any], line: str):
    with pytest.raises(UserError) as failure:
        RaceRun(**changes)
    assert line in str(failure.value)
    assert "\n" not in str(failure.value)
