"""Many arms of one experiment: quality against step time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name, step time over the baseline's, one figure of merit per seed, and whether it may be compared at all.
Point = tuple[str, float, Sequence[float], bool]


def draw_arms(points: Sequence[Point], baseline: str, path: Path) -> None:
    """Write a picture of every arm's bits per byte, best on top, all seeds as dots, step time beside it.

    Arms that look ahead are drawn hollow: their figure is not a language model's.
    """
    order = sorted(points, key=lambda point: sum(point[2]) / len(point[2]))

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.9 + 0.24 * max(len(order), 1))
        for line, (name, time, values, comparable) in enumerate(order):
            middle = sum(values) / len(values)
            colour = theme.sparse[0] if name != baseline else theme.dense[0]
            axes.plot([min(values), max(values)], [line, line], color=theme.muted, linewidth=1)
            face = colour if comparable else theme.paper
            axes.plot(values, [line] * len(values), "o", color=colour, markerfacecolor=face, markersize=4)
            axes.text(
                max(values),
                line,
                f"  {middle:.3f} ({time:.2f}x)",
                va="center",
                fontsize=7.5,
                color=theme.muted,
            )
        lowest = min((min(point[2]) for point in order), default=0.0)
        highest = max((max(point[2]) for point in order), default=1.0)
        span = max(highest - lowest, 1e-3)
        axes.set_xlim(lowest - 0.05 * span, highest + 0.45 * span)
        axes.set_yticks(range(len(order)), [point[0] for point in order], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_xlabel("bits per byte by seed (relative step time)")
        return figure

    image = render("arms", draw, alt="bits per byte of every arm", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
