"""From raw seconds to a row, and from rows to means and goals, by hand."""

from __future__ import annotations

import pytest

from gatewright.measuring import Shape
from gatewright.measuring.grid import Cell
from gatewright.measuring.layer import too_slow
from gatewright.measuring.record import row_record
from gatewright.measuring.sides import FEW, KERNEL, LINEAR, OURS
from gatewright.measuring.summary import expert_costs, geometric_means, goals
from tests.measuring.samples import GROUPED, TINY, row

EAGER = "transformers_eager"
MANY, FEWER = Shape(16384, 128, 256, 256, 2), Shape(16384, 128, 256, 8, 2)


def test_a_row_by_hand():
    seconds = {
        OURS: [2.0, 8.0, 3.0],
        LINEAR: [2.0, 5.0, 2.0],
        KERNEL: [1.0, 8.0, 3.0],
        EAGER: [8.0, 8.0, 8.0],
        GROUPED: [4.0, 32.0, 4.0],
        FEW: [1.0, 2.0, 2.0],
    }
    few = TINY._replace(num_experts=2)
    found = row_record(
        Cell(TINY, "fp32", "forward", few), seconds, {"x": "why"}, lambda shape: shape.num_experts / 4
    )
    # The best dense side of each round takes 1, 5, 2: ratios 2, 1.6, 1.5. transformers' best takes 4, 8, 4.
    assert found["ratios"]["dense"] == {"median": 1.6, "low": 1.5, "high": 2.0}
    assert found["ratios"]["transformers"] == {"median": 0.75, "low": 0.5, "high": 1.0}
    assert found["ratios"]["transformers_over_dense"] == {"median": 2.0, "low": 1.6, "high": 4.0}
    assert found["ratios"]["roofline"] == {"median": 3.0, "low": 2.0, "high": 8.0}
    assert found["ratios"]["fewest_experts"] == {"median": 2.0, "low": 1.5, "high": 4.0}
    assert (found["roofline_seconds"], found["roofline_fewest_seconds"]) == (1.0, 0.5)
    assert found["spread"][LINEAR] == pytest.approx((5 - 2) / 2)
    assert found["seconds"] == seconds
    assert found["left_out"] == {"x": "why"}
    assert (found["name"], found["fewest_experts"]) == ("48x16x8x4x2", 2)


def test_a_row_whose_dense_side_spreads_is_refused():
    assert row(noise=0.25)["refused"] is None
    refused = row(noise=0.3)["refused"]
    assert "spread by 30 %" in refused
    # It is the plain dense side that says how quiet the machine was, not ours.
    calm = {OURS: [1.0, 9.0, 1.0], LINEAR: [1.0] * 3, KERNEL: [1.0, 5.0, 1.0]}
    assert row_record(Cell(TINY, "fp32", "forward", None), calm, {}, lambda _: 1.0)["refused"] is None


def test_without_transformers_its_ratios_are_absent():
    ratios = row(theirs=None)["ratios"]
    assert ratios["transformers"] is None
    assert ratios["transformers_over_dense"] is None
    assert ratios["fewest_experts"] is None
    (entry,) = geometric_means([row(theirs=None)])
    assert entry["transformers"] is None
    held = {goal["goal"]: goal["held"] for goal in goals([row(theirs=None)])}
    assert held["1.6 times as fast as transformers' best, or more"] is None


def test_a_side_is_left_out_by_its_best_call():
    warm = {OURS: [100.0, 100.0], LINEAR: [0.1, 0.1], EAGER: [9.0, 50.0], GROUPED: [1.0, 2.0]}
    assert too_slow(warm) == {}
    warm[EAGER] = [50.0, 11.0]
    assert too_slow(warm) == {EAGER: "one call takes 11 s, 11 times as long as its fastest side"}
    assert too_slow({OURS: [1.0]}) == {}


def test_geometric_means_leave_refused_rows_out():
    rows = [row(ours=1.0, noise=0.0), row(ours=4.0), row(ours=64.0, noise=0.5), row(ours=2.0, dtype="bf16")]
    rows[1]["name"] = "other"
    fp32, bf16 = geometric_means(rows)
    assert (fp32["dtype"], fp32["pass"], fp32["rows"], fp32["refused"]) == ("fp32", "forward-backward", 2, 1)
    assert fp32["dense"] == pytest.approx(2.0)
    assert fp32["transformers"] == pytest.approx(0.5)
    assert fp32["transformers_over_dense"] == pytest.approx(4.0)
    assert fp32["roofline"] == pytest.approx(4.0)
    assert fp32["worst_dense"] == {"name": "other", "ratio": 4.0}
    assert bf16["rows"] == 1
    (nothing,) = geometric_means([row(noise=1.0)])
    assert (nothing["rows"], nothing["dense"], nothing["worst_dense"]) == (0, None, None)
    assert {goal["held"] for goal in goals([row(noise=1.0)])} == {None}


def judged(rows: list) -> dict[str, bool | None]:
    return {goal["goal"]: goal["held"] for goal in goals(rows)}


def test_the_goals_over_dense_and_transformers():
    mean = "geometric mean at most 1.25 times the best dense side"
    worst = "no row above 1.5 times the best dense side"
    faster = "1.6 times as fast as transformers' best, or more"
    calm = [row(ours=1.0, theirs=1.6), row(ours=1.5, theirs=2.4)]
    assert judged(calm) == {mean: True, worst: True, faster: True}
    assert judged([row(ours=1.0), row(ours=1.51)])[worst] is False
    assert judged([row(ours=1.26, theirs=3.0)]) == {mean: False, worst: True, faster: True}
    assert judged([row(ours=1.0, theirs=1.59)])[faster] is False


@pytest.mark.parametrize(
    ("dtype", "width", "ours", "held"),
    [
        ("fp32", 128, 1.25, True),
        ("fp32", 128, 1.26, False),
        ("bf16", 128, 1.35, True),
        ("bf16", 128, 1.36, False),
        # Elsewhere the roofline, here 1.5 times as long with 256 experts, says what they must cost.
        ("fp32", 256, 1.95, True),
        ("fp32", 256, 1.96, False),
    ],
)
def test_the_goal_for_many_experts(dtype: str, width: int, ours: float, held: bool):
    many = row(MANY._replace(width=width), dtype, ours=ours, few=1.0, roofline=1.5)
    many["roofline_fewest_seconds"] = 1.0
    fewer = row(FEWER._replace(width=width), dtype, ours=1.0)
    (cost,) = expert_costs([fewer, many])
    assert (cost["ratio"]["median"], cost["roofline"]) == (ours, 1.5)
    (goal,) = (goal for goal in goals([fewer, many]) if "256 experts" in goal["goal"])
    assert (goal["held"], f"width {width}" in goal["goal"], goal["dtype"]) == (held, True, dtype)
    assert not [goal for goal in goals([fewer]) if "256 experts" in goal["goal"]]


def test_the_goal_for_memory_takes_transformers_leanest_side_and_the_worst_row():
    rows = [row(), row()]
    rows[0]["memory"] = {OURS: 100, LINEAR: 1, EAGER: 120, GROUPED: 110, "transformers_batched_mm": None}
    (goal,) = (goal for goal in goals(rows) if "memory" in goal["goal"])
    assert (goal["held"], goal["figure"]) == (True, 100 / 110)
    rows[1] |= {"name": "other", "memory": {OURS: 100, EAGER: 99, GROUPED: 200}}
    (goal,) = (goal for goal in goals(rows) if "memory" in goal["goal"])
    assert (goal["held"], "other, the worst of 2 rows" in goal["shown"]) == (False, True)
