"""Ratios of times by row: a dot for the median, a bar from the 10th to the 90th percentile, on a log axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A row's name, and for each side its ratio: median, 10th and 90th percentile.
Line = tuple[str, Mapping[str, tuple[float, float, float]]]


def draw_ratios(lines: Sequence[Line], title: str, axis: str, path: Path) -> None:
    """Write a picture of every row's ratios, the first side in blue, the others in orange; 1 is marked."""
    sides = list(dict.fromkeys(side for _, ratios in lines for side in ratios))

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(1.3 + 0.32 * len(lines))
        paint = [theme.sparse[0], *theme.dense]
        for index, side in enumerate(sides):
            colour = paint[index % len(paint)]
            here = [(row, ratios[side]) for row, (_, ratios) in enumerate(lines) if side in ratios]
            for row, (_, low, high) in here:
                axes.plot([low, high], [row, row], color=colour, linewidth=2.4, alpha=0.5)
            places, medians = [row for row, _ in here], [ratio[0] for _, ratio in here]
            axes.plot(medians, places, "o", color=colour, markersize=4.5, label=side)
        axes.axvline(1, color=theme.muted, linewidth=1)
        axes.set_xscale("log")
        ends = [1.0, *(end for _, ratios in lines for ratio in ratios.values() for end in ratio)]
        axes.set_xlim(min(ends) / 1.12, max(ends) * 1.12)
        ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 20) if _between(tick, ends)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_title(title)
        axes.set_xlabel(axis, fontsize=8.5)
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    image = render("ratios", draw, alt=title, caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)


def _between(tick: float, ends: Sequence[float]) -> bool:
    return min(ends) / 1.12 <= tick <= max(ends) * 1.12
