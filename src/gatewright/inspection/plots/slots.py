"""Places of the experts of one batch: filled, empty, and tokens beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .theme import Theme, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Places(NamedTuple):
    """One capacity: what it is called, C, and by expert the tokens that chose it and those it took."""

    name: str
    places: int
    counts: Sequence[int]
    kept: Sequence[int]


def draw_slots(panels: Sequence[Places], path: Path) -> None:
    """Write a picture with a panel per capacity: a bar per expert up to C, empty places hollow, the overflow
    above it.
    """

    def draw(theme: Theme) -> Figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 0.4 + 1.9 * len(panels)), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, own in zip(rows, panels, strict=True):
            experts = range(len(own.counts))
            empty = [own.places - kept for kept in own.kept]
            over = [made - kept for made, kept in zip(own.counts, own.kept, strict=True)]
            axes.bar(experts, own.kept, color=theme.sparse[0], label="filled")
            axes.bar(
                experts,
                empty,
                bottom=own.kept,
                facecolor=theme.neutral,
                edgecolor=theme.muted,
                linewidth=0.6,
                label="empty",
            )
            axes.bar(experts, over, bottom=own.places, color=theme.dense[0], label="overflow")
            axes.axhline(own.places, color=theme.ink, linewidth=0.8, linestyle="--")
            axes.set_title(
                f"{own.name}: {own.places} places each; {sum(own.kept)} filled, {sum(empty)} empty, "
                f"{sum(over)} tokens overflow",
                fontsize=9,
            )
            axes.set_ylabel("tokens")
            axes.grid(axis="y")
        rows[0].legend(fontsize=8, ncols=3)
        rows[-1].set_xticks(range(len(panels[0].counts)))
        rows[-1].set_xlabel("expert")
        return figure

    image = render("slots", draw, alt="places filled, empty and overflowed by expert", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
