"""Pictures of results: a grid of layers row by row, and the parts of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewright.inspection.plots.parts import Bar, draw_parts
from gatewright.inspection.plots.ratios import Line, draw_ratios
from gatewright.measuring.parts import PARTS
from gatewright.measuring.record import Row
from gatewright.measuring.summary import groups, quiet


def draw_pictures(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write one picture per dtype and pass that has a quiet row; return the files."""
    written = []
    for (dtype, kind), members in groups(quiet(rows)).items():
        lines: list[Line] = []
        for row in members:
            named = {"gatewright": "dense", "transformers' best": "transformers_over_dense"}
            found = {name: row["ratios"][key] for name, key in named.items()}
            lines.append((row["name"], {name: tuple(of.values()) for name, of in found.items() if of}))
        path = out / f"layer-{dtype}-{kind}.png"
        title = f"{kind.replace('-', ' and ')}, {dtype}"
        draw_ratios(lines, title, "time over the best dense layer's", path)
        written.append(path)
    return written


def draw_step(rows: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Write one picture per precision; return the files."""
    written = []
    for row in rows:
        sides = {
            name: {part: _bar(side["parts"][part]) for part in PARTS if part in side["parts"]}
            for name, side in row["sides"].items()
        }
        path = out / f"step-{row['precision']}.png"
        draw_parts(sides, PARTS, f"one training step, {row['precision']}", path)
        written.append(path)
    return written


def _bar(own: Mapping[str, float | None]) -> Bar:
    """Return a part's milliseconds; what the profiler's rounding made negative is 0."""
    forward, backward, floor = (own[name] for name in ("forward", "backward", "floor"))
    return max(1e3 * (forward or 0), 0), 1e3 * (backward or 0), None if floor is None else 1e3 * floor
