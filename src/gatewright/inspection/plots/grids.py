"""Grids of shares side by side, each cell with its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_grids(
    grids: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    span: tuple[float, float],
    path: Path,
) -> None:
    """Write one heat map per entry of `grids`, each [rows, columns] of shares, told in per cent; `labels` are
    of rows and columns, `span` the shares of the palest and the deepest colour.
    """

    def draw(theme: Theme) -> Figure:
        from matplotlib.colors import LinearSegmentedColormap

        scale = LinearSegmentedColormap.from_list("share", [theme.neutral, theme.low])
        height = 0.9 + 0.34 * len(rows)
        figure, axes = new_figure(height, width=1.2 + (0.5 * len(columns) + 0.3) * len(grids))
        axes.remove()
        cells = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
        for cell, (name, grid) in zip(cells, grids.items(), strict=True):
            values = np.asarray(grid, dtype=np.float64)
            cell.imshow(values, cmap=scale, vmin=span[0], vmax=span[1], aspect="auto")
            middle = (span[0] + span[1]) / 2
            for (row, column), value in np.ndenumerate(values):
                ink = theme.paper if value > middle else theme.ink
                told = f"{100 * value:.0f}"
                cell.text(column, row, told, ha="center", va="center", fontsize=7, color=ink)
            cell.set_title(name, fontsize=8.5)
            cell.set_xticks(range(len(columns)), list(columns), fontsize=7.5)
            cell.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
            cell.set_xlabel(labels[1], fontsize=8)
            cell.tick_params(length=0)
        cells[0].set_ylabel(labels[0], fontsize=8)
        return figure

    image = render("grids", draw, alt=f"per cent by {labels[0]} and {labels[1]}", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
