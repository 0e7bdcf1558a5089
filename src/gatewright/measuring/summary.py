"""What a whole grid says: geometric means, the cost of more experts, and the goals beside the figures."""

from __future__ import annotations

from collections.abc import Sequence

from gatewright.measuring.record import Row
from gatewright.measuring.rounds import geometric_mean
from gatewright.measuring.sides import OURS, TRANSFORMERS

OVER_DENSE, WORST_OVER_DENSE = 1.25, 1.5
OVER_TRANSFORMERS = 1 / 1.6
# 256 experts over 8 of the same size, at the width where their weights still fit a large cache.
EXPERTS_WIDTH, EXPERTS = 128, {"fp32": 1.25, "bf16": 1.35}
OVER_ROOFLINE = 1.3


def quiet(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that were not refused."""
    return [row for row in rows if row["refused"] is None]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each (dtype, pass) that occurs."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["dtype"], row["pass"]), []).append(row)
    return found


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """Return per dtype and pass the geometric means over rows, and the row with the worst ratio."""
    found = []
    for (dtype, kind), members in groups(rows).items():
        used = quiet(members)
        entry: Row = {"dtype": dtype, "pass": kind, "rows": len(used), "refused": len(members) - len(used)}
        for name in ("dense", "transformers", "transformers_over_dense", "roofline"):
            medians = [(row["ratios"][name]["median"], row["name"]) for row in used if row["ratios"][name]]
            entry[name] = geometric_mean([median for median, _ in medians]) if medians else None
            if name in ("dense", "transformers"):
                ratio, where = max(medians, default=(None, None))
                entry[f"worst_{name}"] = where and {"name": where, "ratio": ratio}
        found.append(entry)
    return found


def expert_costs(rows: Sequence[Row]) -> list[Row]:
    """Return for each row that has a sister with fewer experts what the additional ones cost, and what the
    roofline says they must cost.
    """
    return [
        {
            **{name: row[name] for name in ("name", "dtype", "pass", "shape", "fewest_experts")},
            "ratio": row["ratios"]["fewest_experts"],
            "roofline": row["roofline_seconds"] / row["roofline_fewest_seconds"],
        }
        for row in quiet(rows)
        if row["ratios"]["fewest_experts"]
    ]


def summary(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return everything that is said of the rows together."""
    return {
        "geometric_means": geometric_means(rows),
        "expert_costs": expert_costs(rows),
        "goals": goals(rows),
    }


def goals(rows: Sequence[Row]) -> list[Row]:
    """Return every goal per dtype and pass with its figure: held True or False, None where nothing was
    measured.
    """
    found: list[Row] = []
    for entry in geometric_means(rows):
        of = {"dtype": entry["dtype"], "pass": entry["pass"]}
        some = f" over {counted(entry)}"
        words = f"geometric mean at most {OVER_DENSE} times the best dense side"
        found.append(of | _goal(words, entry["dense"], OVER_DENSE, some))
        worst = entry["worst_dense"] or {"name": "", "ratio": None}
        words = f"no row above {WORST_OVER_DENSE} times the best dense side"
        found.append(of | _goal(words, worst["ratio"], WORST_OVER_DENSE, f" in {worst['name']}"))
        theirs = entry["transformers"]
        told = f" of its time, {1 / theirs:.2f} times as fast{some}" if theirs else ""
        words = "1.6 times as fast as transformers' best, or more"
        found.append(of | _goal(words, theirs, OVER_TRANSFORMERS, told))
        found += [
            of | _goal_of_experts(cost)
            for cost in expert_costs(rows)
            if (cost["dtype"], cost["pass"]) == (of["dtype"], of["pass"]) and is_wide_range(cost)
        ]
    return [*found, *memory_goals(rows)]


def counted(entry: Row) -> str:
    """Return how many rows a mean is over, in words."""
    rows = f"{entry['rows']} row{'' if entry['rows'] == 1 else 's'}"
    return rows + (f", {entry['refused']} refused" if entry["refused"] else "")


def _goal(words: str, figure: float | None, limit: float, told: str) -> Row:
    return {
        "goal": words,
        "limit": limit,
        "figure": figure,
        "held": None if figure is None else figure <= limit,
        "shown": "not measured" if figure is None else f"{figure:.2f}{told}",
    }


def is_wide_range(cost: Row) -> bool:
    """Say whether a cost compares 256 experts with 8."""
    return (cost["shape"]["num_experts"], cost["fewest_experts"]) == (256, 8)


def _goal_of_experts(cost: Row) -> Row:
    width, ratio, roof = cost["shape"]["width"], cost["ratio"]["median"], cost["roofline"]
    if width == EXPERTS_WIDTH:
        limit = EXPERTS[cost["dtype"]]
        words = f"256 experts at most {limit} times the cost of 8 at width {width}"
        return _goal(words, ratio, limit, f" ({roof:.2f} by the roofline)")
    words = f"256 experts over 8 at width {width} at most {OVER_ROOFLINE} times what the roofline says"
    return _goal(words, ratio / roof, OVER_ROOFLINE, f" times: {ratio:.2f}, the roofline says {roof:.2f}")


def memory_goals(rows: Sequence[Row]) -> list[Row]:
    """Return per dtype whether our peak memory is at most that of transformers' leanest side in every row."""
    found = []
    for (dtype, kind), members in groups(rows).items():
        ratios = {}
        for row in members:
            taken = row["memory"] or {}
            theirs = [taken[name] for name in TRANSFORMERS if taken.get(name)]
            if taken.get(OURS) and theirs:
                ratios[row["name"]] = taken[OURS] / min(theirs)
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            told = f" in {worst}, the worst of {len(ratios)} rows"
            words = "peak memory in no row above that of transformers' leanest side"
            found.append({"dtype": dtype, "pass": kind} | _goal(words, ratios[worst], 1.0, told))
    return found
