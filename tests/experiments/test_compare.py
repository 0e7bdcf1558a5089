"""What a race shows, worked by hand on small records."""

from __future__ import annotations

from typing import Any

import pytest

from gatewright.experiments.compare import (
    compare_sides,
    crossing,
    scaling_curve,
    small_data_curve,
    step_time_ratio,
    triangle,
    verdict,
)

Record = dict[str, Any]


def curve(*bits: float, step: int = 100, flops: float = 10.0, seconds: float = 2.0) -> list[Record]:
    return [
        {
            "tokens": step * n,
            "train_flops": step * n * flops,
            "seconds": seconds * n,
            "valid_bpb": value,
            "domains": {},
        }
        for n, value in enumerate(bits, start=1)
    ]


def side(name: str, points: list[Record], **more: Any) -> Record:
    kind = "dense" if name.startswith("dense") else "sparse"
    against = None if kind == "sparse" else "total" if "total" in name else "active"
    turns = [{"round": 0, "steps": 2, "seconds": 3.0 if kind == "sparse" else 2.0}]
    return {
        "name": name,
        "kind": kind,
        "against": against,
        "data_fraction": 1.0,
        "curve": points,
        "final": points[-1],
        "turns": turns,
        "total_parameters": 1000 if kind == "sparse" else 200,
        "active_parameters": 200,
        "settings": {"num_experts": 8},
        **more,
    }


@pytest.mark.parametrize(
    ("target", "axis", "at"),
    [
        (5.0, "tokens", 100.0),
        (4.0, "tokens", 100.0),
        (3.5, "tokens", 150.0),
        (3.0, "tokens", 200.0),
        (2.25, "tokens", 275.0),
        (2.25, "train_flops", 2750.0),
        (2.25, "seconds", 5.5),
        (2.0, "seconds", 6.0),
        (1.99, "seconds", None),
    ],
)
def test_a_curve_crosses_linearly_between_evaluations(target: float, axis: str, at: float | None):
    assert crossing(curve(4.0, 3.0, 2.0), target, axis) == at


def test_the_first_crossing_counts_and_an_empty_curve_has_none():
    assert crossing(curve(4.0, 2.0, 3.0, 1.0), 2.5, "tokens") == 175.0
    assert crossing([], 2.5, "tokens") is None


def turns(*seconds: float, steps: int = 2, first: int = 0) -> Record:
    return {"turns": [{"round": first + n, "steps": steps, "seconds": s} for n, s in enumerate(seconds)]}


def test_step_times_are_paired_by_round():
    # Seconds per step 1, 2, 3 against 1, 4 in rounds 1 and 2: ratios 2/1 and 3/4.
    found = step_time_ratio(turns(2.0, 4.0, 6.0), turns(1.0, 4.0, steps=1, first=1))
    assert found == {"median": 1.375, "low": 0.75, "high": 2.0, "rounds": 2}
    assert step_time_ratio(turns(2.0), turns(2.0, first=1)) is None


def test_the_range_of_step_times_is_the_10th_to_the_90th_percentile():
    # Ratios 1 to 11, in no order.
    sparse = turns(7.0, 3.0, 11.0, 1.0, 5.0, 9.0, 2.0, 10.0, 4.0, 8.0, 6.0)
    found = step_time_ratio(sparse, turns(*[1.0] * 11))
    assert found == {"median": 6.0, "low": 2.0, "high": 10.0, "rounds": 11}


def test_a_comparison_by_hand():
    # Dense ends at 2.0 after 400 tokens, 8,000 FLOPs and 8 s; sparse at 1.75 after 300, 3,000 and 9 s.
    dense = side("dense", curve(4.0, 3.0, 2.5, 2.0, flops=20.0))
    sparse = side("sparse", curve(3.0, 2.5, 1.75, seconds=3.0))
    (found,) = compare_sides({"seed": 3, "sides": [dense, sparse]})
    assert (found["seed"], found["sparse"], found["dense"], found["against"]) == (
        3,
        "sparse",
        "dense",
        "active",
    )
    assert (found["gap_bpb"], found["held"]) == (0.25, True)
    assert (found["dense_bpb"], found["sparse_bpb"]) == (2.0, 1.75)
    assert (found["token_share"], found["flop_share"], found["second_share"]) == (0.75, 0.375, 1.125)
    # 2.5 to 1.75 crosses 2.0 after two thirds: 266.7 tokens, 2,666.7 FLOPs, 8 s.
    assert found["speedup"] == pytest.approx({"tokens": 400 * 3 / 800, "flops": 3.0, "seconds": 1.0})
    assert found["step_time_ratio"]["median"] == 1.5


def test_a_lost_race_has_a_negative_gap_and_no_speed_up():
    dense, sparse = side("dense", curve(3.0, 2.0)), side("sparse", curve(3.0, 2.1))
    found = compare_sides({"seed": 0, "sides": [dense, sparse]})
    assert found[0]["gap_bpb"] == pytest.approx(-0.1)
    assert found[0]["held"] is False
    assert found[0]["speedup"] == {"tokens": None, "flops": None, "seconds": None}
    told = verdict(found, 1)
    assert told["held"] is False
    assert told["sentence"] == (
        "Not held: the sparse model, annealed on 100 % of the tokens, ends 0.1000 bits per byte above its "
        "dense twin annealed on 100 %, in 100 % of its training seconds; seed 0 alone."
    )


def test_only_sides_of_the_same_text_are_compared():
    sides = [
        side(name, curve(3.0, 2.0), data_fraction=share)
        for share in (0.5, 1.0)
        for name in (f"dense-{share}", f"sparse-{share}")
    ]
    pairs = [(c["sparse"], c["dense"]) for c in compare_sides({"seed": 0, "sides": sides})]
    assert pairs == [("sparse-0.5", "dense-0.5"), ("sparse-1.0", "dense-1.0")]


def compared(*gaps: float, **more: Any) -> list[Record]:
    return [
        {
            "seed": seed,
            "sparse": "sparse",
            "dense": "dense",
            "against": "active",
            "sparse_parameters": 1000,
            "data_fraction": 1.0,
            "gap_bpb": gap,
            "token_share": 0.7,
            "second_share": 0.9 + seed / 10,
            **more,
        }
        for seed, gap in enumerate(gaps)
    ]


@pytest.mark.parametrize(
    ("gaps", "held", "mean", "spread"),
    [
        ((0.02, 0.03, 0.025), True, 0.025, 0.01),
        # Positive throughout, yet the seeds differ by more.
        ((0.001, 0.03, 0.02), False, 0.017, 0.029),
        # The mean has to be above the spread, not at it.
        ((0.125, 0.375), False, 0.25, 0.25),
        ((0.02, -0.001, 0.03), False, 0.049 / 3, 0.031),
        ((-0.02, -0.021), False, -0.0205, 0.001),
        ((0.01, 0.01), True, 0.01, 0.0),
        ((0.0, 0.0), False, 0.0, 0.0),
        # One seed has no spread: not negative is all that can be asked.
        ((0.0,), True, 0.0, 0.0),
        ((0.004,), True, 0.004, 0.0),
        ((-0.0001,), False, -0.0001, 0.0),
    ],
)
def test_held_is_a_mean_gap_above_the_spread_of_the_seeds(
    gaps: tuple[float, ...], held: bool, mean: float, spread: float
):
    told = verdict(compared(*gaps), len(gaps))
    assert told["held"] is held
    assert told["gap_mean"] == pytest.approx(mean, abs=1e-12)
    assert told["gap_spread"] == pytest.approx(spread, abs=1e-12)
    assert told["seeds"] == len(gaps)
    assert told["sentence"].startswith("Held: " if held else "Not held: ")


def test_the_sentence_says_tokens_gap_spread_seconds_and_seeds():
    assert verdict(compared(0.02, 0.03, 0.025), 3)["sentence"] == (
        "Held: the sparse model, annealed on 70 % of the tokens, ends 0.0250 bits per byte below its dense "
        "twin annealed on 100 % (spread of the gaps 0.0100), in 100 % of its training seconds; seeds 0, 1, 2."
    )


def test_the_headline_is_the_most_text_then_the_equal_compute_twin_then_the_largest_side():
    few = compared(0.5, data_fraction=0.1)
    total = compared(0.4, dense="dense-total", against="total")
    small = compared(0.3, sparse="sparse-2", sparse_parameters=10)
    chosen = compared(0.2, sparse="sparse-8", sparse_parameters=90)
    for order in ([few, total, small, chosen], [chosen, small, total, few]):
        told = verdict([c for part in order for c in part], 1)
        assert (told["gap_mean"], told["sparse"], told["dense"]) == (0.2, "sparse-8", "dense")
    assert verdict(total, 1)["dense"] == "dense-total"


def test_a_race_that_was_stopped_has_the_verdict_of_its_finished_seeds_or_none():
    told = verdict(compared(0.02), 3)
    assert told["sentence"].endswith("seed 0 alone. Stopped: 1 of 3 seeds have ended.")
    none = verdict([], 3)
    assert (none["held"], none["gap_mean"], none["gap_spread"], none["seeds"]) == (None, None, None, 0)
    assert none["sentence"].startswith("No verdict: the race was stopped")


def three_sides(sparse: float, active: float, total: float, seconds: float = 2.0) -> list[Record]:
    return [
        {
            "seed": 0,
            "sides": [
                side("dense-active", curve(9.0, active)),
                side("dense-total", curve(9.0, total, flops=40.0, seconds=5.0), total_parameters=1000),
                side("sparse", curve(9.0, sparse, seconds=seconds)),
            ],
        }
    ]


@pytest.mark.parametrize(
    ("sparse", "seconds", "held"),
    [
        # Better than both, as fast as the small one.
        (1.0, 2.0, [True, True, True, True]),
        # Between them, slower than the small one.
        (1.8, 3.0, [True, False, True, False]),
        # Worse than both and slower than both.
        (2.5, 6.0, [False, False, False, False]),
        # Worse in quality, so its speed does not count.
        (2.5, 1.0, [False, False, True, False]),
    ],
)
def test_each_claim_of_the_triangle_is_held_or_not(sparse: float, seconds: float, held: list[bool]):
    found = triangle(three_sides(sparse, active=2.0, total=1.5, seconds=seconds))
    assert [claim["held"] for claim in found["claims"]] == held
    assert [claim["claim"].split(" than ")[0].split(" as ")[0] for claim in found["claims"]] == [
        "better",
        "in less time",
        "cheaper to train",
        "as good",
    ]
    # 200 tokens at 40 FLOPs against 200 at 10; 10 s against 2 evaluations' worth.
    assert found["claims"][2]["detail"].startswith(
        f"4.0 times fewer training FLOPs, {10 / (2 * seconds):.1f} times"
    )


def test_the_triangle_takes_means_over_seeds():
    one, two = three_sides(1.0, 2.0, 1.5), three_sides(2.0, 2.5, 1.7)
    points = {p["name"]: p for p in triangle([*one, {**two[0], "seed": 1}])["points"]}
    assert {name: p["valid_bpb"] for name, p in points.items()} == pytest.approx(
        {"dense-active": 2.25, "dense-total": 1.6, "sparse": 1.5}
    )
    assert points["dense-total"]["total_parameters"] == 1000
    assert points["sparse"]["train_flops"] == 2000.0


def test_the_scaling_curve_has_a_point_per_sparse_side():
    sides = [
        side("dense", curve(2.0)),
        side("sparse-4", curve(1.9), settings={"num_experts": 4}, total_parameters=400),
        side("sparse-8", curve(1.8), settings={"num_experts": (1, 8)}, total_parameters=800),
    ]
    assert scaling_curve([{"seed": 2, "sides": sides}]) == [
        {"num_experts": 4, "total_parameters": 400, "valid_bpb": 1.9, "seed": 2},
        {"num_experts": 8, "total_parameters": 800, "valid_bpb": 1.8, "seed": 2},
    ]


def test_the_small_data_curve_keeps_the_best_point_beside_the_last():
    sides = [side("dense", curve(2.0, 1.5, 1.75), data_fraction=0.1), side("sparse", curve(2.0, 1.5))]
    assert small_data_curve([{"seed": 0, "sides": sides}]) == [
        {"fraction": 0.1, "kind": "dense", "valid_bpb": 1.75, "best_bpb": 1.5, "seed": 0},
        {"fraction": 1.0, "kind": "sparse", "valid_bpb": 1.5, "best_bpb": 1.5, "seed": 0},
    ]
