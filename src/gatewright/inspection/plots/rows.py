"""Rows of a published table: our seeds as dots, the published figure as a mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, our figure of each seed, and the published one where there is one.
Row = tuple[str, Sequence[float], float | None]


def draw_rows(rows: Sequence[Row], label: str, path: Path, logarithmic: bool = False) -> None:
    """Write a picture with a line per row, on a logarithmic scale where asked for."""

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(1.1 + 0.27 * len(rows), width=6.4)
        for line, (_, ours, theirs) in enumerate(rows):
            axes.plot(ours, [line] * len(ours), "o", color=theme.sparse[0], markersize=4, alpha=0.8)
            if theirs is not None:
                axes.plot([theirs], [line + 0.25], "|", color=theme.muted, markersize=9)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_xlabel(label)
        return figure

    image = render("rows", draw, alt=label, caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
