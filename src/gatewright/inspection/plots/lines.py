"""Decision lines of experts on the formant plane, and the way they took."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .theme import Theme, new_figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VOWELS = (("i", "o"), ("I", "x"), ("a", "s"), ("^", "+"))


def draw_lines(
    formants: NDArray[np.float64], vowel: NDArray[np.int64], run: Mapping[str, Any], path: Path
) -> None:
    """Write the vowels [n, 2] in kHz, the line of each used expert, and dashed where the gate passes from
    one to the next.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(4.2, width=5.6)
        for place, (name, marker) in enumerate(_VOWELS):
            own = formants[vowel == place]
            axes.plot(
                own[:, 0],
                own[:, 1],
                marker,
                color=theme.cycle[place],
                markersize=3,
                alpha=0.7,
                label=f"[{name}]",
                linestyle="none",
            )
        low, high = formants.min(0) - 0.1, formants.max(0) + 0.1
        across = np.linspace(low[0], high[0], 200)
        used = list(run["used"])
        for expert in used:
            axes.plot(
                across, _height(run["lines"][expert], across), color=theme.ink, label=f"expert {expert}"
            )
        for one, two in itertools.pairwise(used):
            gap = np.subtract(run["gate"][one], run["gate"][two])
            axes.plot(
                across, _height(gap, across), "--", color=theme.muted, label=f"gate between {one} and {two}"
            )
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.set_xlabel("F1, kHz")
        axes.set_ylabel("F2, kHz")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    _write(render("lines", draw, alt="decision lines on the formant plane", caption="").light, path)


def _height(line: Sequence[float] | NDArray[np.float64], across: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where the line w1 F1 + w2 F2 + b = 0 lies above each F1."""
    first, second, bias = (float(value) for value in line)
    return -(first * across + bias) / second


def draw_paths(
    feet: Sequence[Sequence[Sequence[float]]], used: Sequence[int], alone: Mapping[str, Any], path: Path
) -> None:
    """Write the way of each expert's line, as the foot of its normal from the origin; used ones in colour,
    and crosses where lines that were learned from one pair alone lie.
    """
    points = np.asarray(feet)

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(4.0, width=5.6)
        for expert in range(points.shape[1]):
            alive = expert in used
            axes.plot(
                points[:, expert, 0],
                points[:, expert, 1],
                ".-",
                color=theme.cycle[list(used).index(expert) % 8] if alive else theme.muted,
                markersize=2.5,
                linewidth=0.5,
                alpha=1 if alive else 0.35,
                label=f"expert {expert}" if alive else None,
            )
        for marker, (name, own) in zip("x+", alone.items(), strict=True):
            axes.plot(
                *own["foot"],
                marker,
                color=theme.ink,
                markersize=8,
                linestyle="none",
                label=f"{name} alone",
                zorder=5,
            )
        axes.set_xlim(-1.2, 1.2)
        axes.set_ylim(-0.6, 1.8)
        axes.set_xlabel("foot of the normal: F1, kHz")
        axes.set_ylabel("F2, kHz")
        axes.legend(fontsize=7)
        return figure

    _write(render("paths", draw, alt="the way of each expert's line", caption="").light, path)


def _write(picture: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
