"""A measured training step: as plain data, as a table for people, and beside its goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatewright.errors import RunFailure
from gatewright.measuring.parts import PARTS
from gatewright.measuring.result import ratio_text

SCHEMA = "gatewright.bench.step.v1"
# Goals: a whole sparse step over its dense twin's, and what this toolkit's operators gain on either.
MOST_OVER_DENSE, LEAST_GAIN = 1.2, 1.5


@dataclass(frozen=True)
class StepResult:
    """What `bench_step` measured; `record` is what step.json holds."""

    record: Mapping[str, Any]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.record, "files": list(self.files)}

    def check(self) -> None:
        """Raise RunFailure if the machine was too busy for a precision."""
        for row in self.record["rows"]:
            if row["refused"]:
                raise RunFailure(f"{row['precision']}: {row['refused']}; run again on a quiet machine")

    def to_text(self) -> str:
        """Return the ratios, a table of parts for each precision, and the goals."""
        lines = []
        for row in self.record["rows"]:
            lines += [told(row), *size_lines(row), *part_lines(row), ""]
        lines += ["goals", *map(goal_line, self.record["goals"]), "", *self.files]
        return "\n".join(lines)


def told(row: Mapping[str, Any]) -> str:
    """Return a row's whole steps in a line."""
    if row["refused"]:
        return f"{row['precision']} refused: {row['refused']}"
    shown = ", ".join(
        f"{name.replace('_', ' ')} {1e3 * own['median']:.1f} ms" for name, own in row["step_seconds"].items()
    )
    gains = [
        f"{name} {ratio_text(row['ratios'][f'{name}_gain'])}"
        for name in ("sparse", "dense")
        if row["ratios"][f"{name}_gain"]
    ]
    gained = f"; over torch's own operators: {', '.join(gains)} times as fast" if gains else ""
    ratio = ratio_text(row["ratios"]["sparse_over_dense"])
    return f"{row['precision']}: {shown}; sparse over dense {ratio}{gained}"


def size_lines(row: Mapping[str, Any]) -> list[str]:
    """Return tokens per expert and step where there are experts, and peak memory where it was measured."""
    lines = []
    for name, seconds in row.get("start_seconds", {}).items():
        ratio = ratio_text(row["ratios"][name])
        told = f"{ratio} times the time of a step that is not, and {seconds:.0f} s at first"
        lines.append(f"  {name.replace('_', ' ')}: {told}")
    for name, side in row["sides"].items():
        if side.get("tokens_per_expert"):
            lines.append(f"  {name}: {side['tokens_per_expert']:g} tokens per expert and step")
        if "memory" in side:
            lines.append(f"  {name}: {memory_text(side['memory'])}")
    return lines


def memory_text(memory: Mapping[str, Any] | None) -> str:
    """Return a peak and its floor in words."""
    if memory is None:
        return "the process whose memory was measured died"
    peak, floor = (memory[part] / 2**20 for part in ("peak", "floor"))
    return f"peak memory {peak:.0f} MiB, {memory['over_floor']:.2f} times its floor of {floor:.0f} MiB"


def part_lines(row: Mapping[str, Any]) -> list[str]:
    """Return the table of parts: milliseconds forward + backward, and times the part's floor."""
    sides = row["sides"]
    lines = ["  " + f"{'part':16}" + "".join(f"{name + ' ms':>22}{'/ floor':>9}" for name in sides)]
    for part in PARTS:
        if any(part in side["parts"] for side in sides.values()):
            cells = "".join(_cell(side["parts"].get(part)) for side in sides.values())
            lines.append(f"  {part:16}{cells}")
    return lines


def _cell(own: Mapping[str, Any] | None) -> str:
    if own is None:
        return f"{'-':>22}{'-':>9}"
    taken = own["forward"] + own["backward"]
    over = f"{taken / own['floor']:.1f}" if own["floor"] else "-"
    return f"{1e3 * own['forward']:10.2f} +{1e3 * own['backward']:10.2f}{over:>9}"


def step_goals(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a row was to reach, what it shows, and whether it holds (None: refused, or not timed)."""
    ratios, goals = row["ratios"], []
    wanted = [("sparse_over_dense", f"a sparse step at most {MOST_OVER_DENSE} times its dense twin's")]
    wanted += [
        (f"{name}_gain", f"a {name} step at least {LEAST_GAIN} times as fast as by torch's own operators")
        for name in ("sparse", "dense")
    ]
    for name, goal in wanted:
        ratio = None if row["refused"] else ratios[name]
        held = None
        if ratio:
            over = name == "sparse_over_dense"
            held = ratio["median"] <= MOST_OVER_DENSE if over else ratio["median"] >= LEAST_GAIN
        goals.append({"precision": row["precision"], "goal": goal, "shown": ratio_text(ratio), "held": held})
    return goals


def goal_line(goal: Mapping[str, Any]) -> str:
    """Return one goal as a line."""
    word = {True: "held", False: "not held", None: "open"}[goal["held"]]
    return f"  {word:9}{goal['precision']}: {goal['goal']}: {goal['shown']}"
