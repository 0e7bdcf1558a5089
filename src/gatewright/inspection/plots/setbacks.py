"""What new material does to what was learned first: a panel per experiment, a line per system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Sequence[tuple[float, float]]


def draw_setbacks(panels: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """Write a picture with the panels one above the other; a line whose name ends in "stayed" is dashed."""

    def draw(theme: Theme) -> Figure:
        figure, first = new_figure(2.6 * len(panels))
        figure.delaxes(first)
        for place, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(len(panels), 1, place + 1)
            for number, (name, points) in enumerate(lines.items()):
                stayed = name.endswith("stayed")
                colour = theme.cycle[(number // 2 if "," in name else number) % len(theme.cycle)]
                axes.plot(
                    *zip(*points, strict=True), color=colour, linestyle="--" if stayed else "-", label=name
                )
            axes.set_title(title, fontsize=9)
            axes.grid(axis="y")
            axes.legend(fontsize=7.5)
        return figure

    image = render("setbacks", draw, alt="error on what was learned first, by system", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
