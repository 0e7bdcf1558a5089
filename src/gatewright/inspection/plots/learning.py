"""Learning curves of several systems: an error by epoch, a line per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A run's epochs and the error after each; a single point is drawn as a level line.
Curve = tuple[Sequence[float], Sequence[float]]


def draw_learning(
    systems: Mapping[str, Sequence[Curve]],
    axis: str,
    path: Path,
    along: str | None = None,
) -> None:
    """Write a picture of every run of every system over epochs from 1, on a logarithmic axis and from an
    error of 0; over what `along` says, evenly, with what is there framed.
    """

    from matplotlib.ticker import FuncFormatter

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(3.6)
        for index, (name, curves) in enumerate(systems.items()):
            colour = theme.cycle[index % len(theme.cycle)]
            for run, (epochs, errors) in enumerate(curves):
                label = name if run == 0 else None
                if len(epochs) < 2:
                    axes.axhline(errors[0], label=label, linewidth=0.9, color=colour)
                else:
                    axes.plot(epochs, errors, label=label, linewidth=1.1, alpha=0.85, color=colour)
        if along is None:
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
        # Plain numbers: the theme sets no formulas, which the usual labels of a logarithmic axis are.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(axis="y")
        axes.set_xlabel(along or "epochs: passes over the training cases")
        axes.set_ylabel(axis)
        figure.legend(loc="outside upper left", ncols=3, fontsize=7.5)
        return figure

    image = render("learning", draw, alt=f"{axis} of every system", caption="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.light)
