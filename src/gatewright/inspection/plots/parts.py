"""Parts of a training step as bars, the floor of each as a mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A part's milliseconds forward and backward, and its floor where it has one.
Bar = tuple[float, float, float | None]


def draw_parts(sides: Mapping[str, Mapping[str, Bar]], order: Sequence[str], title: str, path: Path) -> None:
    """Write a picture with one bar per part and side: forward in full colour, backward paler behind it.
    Parts that no side has are left out of the `order`.
    """
    parts = [part for part in order if any(part in own for own in sides.values())]

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(1.2 + 0.2 * len(parts) * len(sides))
        step = 0.8 / len(sides)
        paint = [theme.sparse[0], *theme.dense]
        for index, (side, own) in enumerate(sides.items()):
            for line, part in enumerate(parts):
                if part not in own:
                    continue
                forward, backward, floor = own[part]
                height = line - 0.4 + (index + 0.5) * step
                colour = paint[index % len(paint)]
                axes.barh(height, forward, height=step * 0.86, color=colour)
                axes.barh(height, backward, left=forward, height=step * 0.86, color=colour, alpha=0.5)
                if floor is not None:
                    axes.plot([floor, floor], [height - step / 2, height + step / 2], color=theme.ink, lw=1.4)
            axes.barh(0, 0, color=paint[index % len(paint)], label=side)
        axes.plot([], [], color=theme.ink, lw=1.4, label="floor")
        axes.set_yticks(range(len(parts)), [part.replace("_", " ") for part in parts])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_title(title)
        axes.set_xlabel("milliseconds per step: forward, then backward (paler)", fontsize=8.5)
        figure.legend(loc="outside upper left", ncols=3)
        return figure

    image = render("parts", draw, alt=title, caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
