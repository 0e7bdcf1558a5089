"""An error of several systems, every seed as a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_errors(
    systems: Mapping[str, Sequence[float]],
    path: Path,
    *,
    label: str = "squared error on the test speakers, a dot per seed",
    told: Mapping[str, float] | None = None,
    ours: str | None = None,
) -> None:
    """Write a picture with a line per system; the first is the one that the others are set against, or those
    whose name holds `ours`. `told`: a paper's own error of a system, as an upright mark.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.9 + (0.3 if told is None else 0.2) * len(systems))
        for line, (name, errors) in enumerate(systems.items()):
            first = ours in name if ours else line == 0
            colour = theme.sparse[0] if first else theme.dense[0]
            axes.plot(errors, [line] * len(errors), "o", color=colour, markersize=4, alpha=0.7)
            if told and name in told:
                axes.plot([told[name]], [line], "|", color=theme.ink, markersize=9)
        axes.set_yticks(range(len(systems)), list(systems), fontsize=8 if told is None else 6.5)
        axes.set_ylim(len(systems) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.set_xlabel(label)
        return figure

    image = render("errors", draw, alt="test error of every system and seed", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
