"""Epochs of many runs per system, beside a published mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, epochs of every run, and the published mean and standard deviation.
Row = tuple[str, Sequence[int], float, float]


def draw_epochs(rows: Sequence[Row], path: Path) -> None:
    """Write a picture with a line per system: our runs as dots, the published mean and spread as a bar."""

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(1.1 + 0.27 * len(rows), width=6.4)
        for line, (name, epochs, mean, spread) in enumerate(rows):
            colour = theme.sparse[0] if "experts" in name else theme.dense[0]
            axes.plot(epochs, [line] * len(epochs), "o", color=colour, markersize=3.5, alpha=0.6)
            axes.errorbar([mean], [line + 0.3], xerr=[spread], fmt="|", color=theme.muted, capsize=2)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.set_xlabel("epochs to the criterion: a dot per run; grey, the paper's mean and SD")
        return figure

    image = render("epochs", draw, alt="epochs of every run", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
