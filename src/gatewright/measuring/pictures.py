"""The picture of a grid: our layer and transformers' best over the best dense side, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gatewright.inspection.plots.ratios import Line, draw_ratios
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
