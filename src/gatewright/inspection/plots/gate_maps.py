"""Gates of a deep mixture: maps over places and classes, pairs of experts, experts in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .theme import Theme, few_ticks, new_figure, render

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")


def _scale(theme: Theme) -> LinearSegmentedColormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", [theme.neutral, theme.low])


def _means(table: Sequence[Sequence[float]]) -> np.ndarray:
    """Return sums of gates [N, E] as mean gates: rows that sum to 1."""
    sums = np.asarray(table, dtype=np.float64)
    return sums / sums.sum(1, keepdims=True)


def draw_maps(gates: Mapping[str, Any], path: Path) -> None:
    """Write, a line per layer, each expert's mean gate over the places and, at the right, the classes."""

    def draw(theme: Theme) -> Figure:
        layers, experts = len(gates["place"]), max(len(rows[0]) for rows in gates["place"])
        figure, axes = new_figure(0.5 + 1.4 * layers, width=1.1 * experts + 2.4)
        axes.remove()
        grid = figure.subplots(layers, experts + 1, squeeze=False, width_ratios=[1.0] * experts + [1.6])
        for layer, line in enumerate(grid):
            places, classes = _means(gates["place"][layer]), _means(gates["label"][layer])
            side = round(len(places) ** 0.5)
            for expert, cell in enumerate(line[:-1]):
                cell.set_axis_off()
                if expert < places.shape[1]:
                    own = places[:, expert].reshape(side, side)
                    cell.imshow(own, cmap=_scale(theme), vmin=0, vmax=1)
                    cell.set_title(f"layer {layer + 1}, {expert}", fontsize=8, fontweight="normal")
            cell = line[-1]
            image = cell.imshow(classes.T, cmap=_scale(theme), vmin=0, vmax=1, aspect="auto")
            cell.set_xticks(range(len(classes)), [str(c) for c in range(len(classes))], fontsize=7)
            cell.set_yticks(range(classes.shape[1]), [str(e) for e in range(classes.shape[1])], fontsize=7)
            cell.set_title("by class", fontsize=8, fontweight="normal")
            cell.tick_params(length=0)
            bar = figure.colorbar(image, ax=cell, fraction=0.08, pad=0.03)
            bar.set_ticks([0, 1])
            bar.outline.set_visible(False)
        return figure

    _write(render("maps", draw, alt="mean gate of each expert by place and class", caption="").light, path)


def draw_pairs(tables: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Write, for each table of sums of g1 g2 [E1, E2], the second layer's experts given the first's."""

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(0.6 + 1.5 * len(tables), width=5.6)
        axes.remove()
        grid = figure.subplots(len(tables), 1, squeeze=False)
        top = max(float(_means(own).max()) for own in tables.values())
        for cell, (name, own) in zip(grid[:, 0], tables.items(), strict=True):
            image = cell.imshow(_means(own), cmap=_scale(theme), vmin=0, vmax=top, aspect="auto")
            cell.set_title(name, fontsize=8.5)
            cell.set_ylabel("layer 1")
            cell.set_xlabel("layer 2's expert")
            cell.set_yticks(range(len(own)))
            cell.tick_params(length=0, labelsize=7)
            bar = figure.colorbar(image, ax=cell, fraction=0.04, pad=0.02)
            bar.outline.set_visible(False)
        return figure

    _write(render("pairs", draw, alt="experts of layer 2 given those of layer 1", caption="").light, path)


def draw_effective(
    arms: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], first_phase: int, path: Path
) -> None:
    """Write how many experts' worth each layer used in each epoch: a line per seed and layer, arms by colour;
    the first phase ends at the upright line.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = new_figure(3.2, width=5.6)
        for colour, (name, curves) in zip(theme.cycle, arms.items(), strict=False):
            for seed, curve in enumerate(curves):
                for layer, dashes in zip(range(len(curve[0]["effective"])), _DASHES, strict=False):
                    values = [epoch["effective"][layer] for epoch in curve]
                    label = f"{name}, layer {layer + 1}" if seed == 0 else None
                    epochs = range(1, len(values) + 1)
                    axes.plot(epochs, values, dashes, color=colour, linewidth=1.0, alpha=0.8, label=label)
        axes.axvline(first_phase + 0.5, color=theme.muted, linewidth=0.8)
        axes.set_ylim(bottom=0.9)
        axes.xaxis.set_major_locator(few_ticks(6, integer=True))
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
        axes.set_ylabel("experts' worth in use")
        axes.legend(fontsize=7)
        return figure

    _write(render("experts", draw, alt="experts in use over training", caption="").light, path)


def _write(picture: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
