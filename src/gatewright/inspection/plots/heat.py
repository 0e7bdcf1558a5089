"""Heat maps per router: load over time, and specialisation by domain; drops over time as lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..record import number, rows, table
from ..words import escape, percent, tick
from .theme import Image, Theme, few_ticks, new_figure, render, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

COLUMNS = 300  # more evaluation points than this are averaged: a screen has no more pixels for them


def matrix(value: Any) -> np.ndarray | None:
    """Return a [rows, columns] array of float64, or None for anything ragged, empty or not numeric."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 2 and array.size and np.isfinite(array).all() else None


def load_series(side: Mapping[str, Any], router: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps [P] and load shares [P, E] of one router, or None where they are not recorded."""
    array = matrix(table(side, "load_over_time", "routers").get(router))
    if array is None:
        return None
    steps = np.asarray([float(step) for step in rows(side, "load_over_time", "steps")[: len(array)]])
    if len(steps) != len(array):
        steps = np.arange(len(array), dtype=np.float64)
    return steps, array


def _around(theme: Theme) -> LinearSegmentedColormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("around", [theme.low, theme.neutral, theme.high])


def _edges(centres: np.ndarray) -> np.ndarray:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    inner = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[centres[0] - (inner[0] - centres[0])], inner, [2 * centres[-1] - inner[-1]]])


def reach(tables: Iterable[np.ndarray], even: float) -> float:
    """Return the factor above and below the even share at which colour saturates, 2 to 8."""
    largest = max((float(table.max()) for table in tables), default=even)
    return min(8.0, max(2.0, largest / even))


def share_map(
    columns: np.ndarray, values: np.ndarray, even: float, factor: float, theme: Theme, height: float
) -> tuple[Figure, Axes]:
    """Return a heat map of shares on a logarithmic scale around `even`, the neutral colour."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullLocator

    figure, axes = new_figure(height)
    low, high = even / factor, even * factor
    lines = np.arange(len(values) + 1) - 0.5
    shown = np.clip(values, low, high)  # zero has no logarithm; it is the deepest blue
    mesh = axes.pcolormesh(
        columns, lines, shown, cmap=_around(theme), norm=LogNorm(low, high), rasterized=True
    )
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.05, aspect=18)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    top = percent(high) if high <= 1 else ""
    bar.set_ticks([low, even, high], labels=[f"≤ {percent(low)}", percent(even), top and f"≥ {top}"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _draw_load(steps: np.ndarray, load: np.ndarray, factor: float, title: str, theme: Theme) -> Figure:
    if len(steps) > COLUMNS:
        parts = np.array_split(np.arange(len(steps)), COLUMNS)
        steps = np.array([steps[part].mean() for part in parts])
        load = np.stack([load[part].mean(axis=0) for part in parts])
    experts = load.shape[1]
    height = 1.5 + min(1.7, 0.1 * experts)
    figure, axes = share_map(_edges(steps), load.T, 1 / experts, factor, theme, height)
    axes.set_title(shorten(title, 44))
    axes.set_xlabel("training step")
    axes.set_ylabel("expert")
    axes.yaxis.set_major_locator(few_ticks(6, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    axes.invert_yaxis()
    return figure


def load_images(side: Mapping[str, Any], slug: str) -> list[Image]:
    """Return one heat map of load over training per router; all share one colour scale."""
    series = {
        name: found for name in table(side, "load_over_time", "routers") if (found := load_series(side, name))
    }
    if not series:
        return []
    factor = max(reach([load], 1 / load.shape[1]) for _, load in series.values())
    images = []
    for name, (steps, load) in series.items():
        experts = load.shape[1]
        final = load[-1]
        words = (
            f"Load of {name}: share of assignments of each of {experts} experts over training. An even share "
            f"is {percent(1 / experts)}; at the end the most is {percent(float(final.max()))}, the least "
            f"{percent(float(final.min()))}."
        )
        images.append(
            render(
                f"load_{slug}{name}",
                lambda theme, a=steps, b=load, c=factor, d=name: _draw_load(a, b, c, d, theme),  # type: ignore[misc]
                alt=words,
                caption=f"<b>{escape(name)}</b>: even share {percent(1 / experts)}; at the end "
                f"{percent(float(final.min()))} to {percent(float(final.max()))}.",
            )
        )
    return images


def specialisation_order(shares: np.ndarray) -> np.ndarray:
    """Return the experts of a [domains, E] table grouped by the domain that uses each most, fullest first."""
    best = shares.argmax(axis=0)
    return np.lexsort((-shares.max(axis=0), best))


def _draw_specialisation(
    shares: np.ndarray, domains: Sequence[str], chance: float, factor: float, title: str, theme: Theme
) -> Figure:
    experts = shares.shape[1]
    order = specialisation_order(shares)
    height = 1.15 + 0.27 * len(domains)
    columns = np.arange(experts + 1) - 0.5
    figure, axes = share_map(columns, shares[:, order], chance, factor, theme, height)
    axes.set_title(shorten(title, 44))
    axes.set_yticks(range(len(domains)), [shorten(name, 16) for name in domains])
    axes.set_xlabel("expert, grouped by the domain that selects it most")
    every = -(-experts // 16)
    shown = range(0, experts, every)
    axes.set_xticks(shown, [str(order[index]) for index in shown], fontsize=7.5)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    return figure


def specialisation_images(side: Mapping[str, Any], slug: str) -> list[Image]:
    """Return one heat map, domain x expert, per router: share of a domain's tokens that select the expert."""
    domains = [str(name) for name in rows(side, "specialisation", "domains")]
    tables = {
        name: shares
        for name, value in table(side, "specialisation", "routers").items()
        if (shares := matrix(value)) is not None and len(shares) == len(domains)
    }
    images = []
    factor = max(
        (reach([shares], chance_level(side, name, shares)) for name, shares in tables.items()), default=2.0
    )
    for name, shares in tables.items():
        chance = chance_level(side, name, shares)
        domain, expert = np.unravel_index(int(shares.argmax()), shares.shape)
        peak = f"{percent(float(shares.max()))} of the tokens of {domains[domain]} select expert {expert}"
        images.append(
            render(
                f"specialisation_{slug}{name}",
                lambda theme, a=shares, b=chance, c=name: _draw_specialisation(
                    a, domains, b, factor, c, theme
                ),  # type: ignore[misc]
                alt=f"Domain specialisation of {name}: share of a domain's tokens that select each expert. "
                f"Chance is {percent(chance)}. Largest: {peak}.",
                caption=f"<b>{escape(name)}</b>: chance {percent(chance)}. Largest: {escape(peak)}.",
            )
        )
    return images


def chance_level(side: Mapping[str, Any], router: str, shares: np.ndarray) -> float:
    """Return K/E as recorded, else the mean of the table, which equals it when every token is routed."""
    chance = number(side, "specialisation", "chances", router)
    if chance is None:
        chance = number(side, "specialisation", "chance")
    if chance is None or not 0 < chance <= 1:
        chance = float(shares.mean())
    return min(max(chance, 1e-6), 1.0)


def drop_series(side: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return (step, share of assignments dropped) per router, recorded points only."""
    steps = rows(side, "dropped_over_time", "steps")
    series: dict[str, list[tuple[float, float]]] = {}
    for name, values in table(side, "dropped_over_time", "routers").items():
        pairs = [
            (float(step), float(value))
            for step, value in zip(steps, values if isinstance(values, list | tuple) else [], strict=False)
            if isinstance(step, int | float) and isinstance(value, int | float) and np.isfinite(value)
        ]
        if pairs:
            series[name] = pairs
    return series


def _draw_drops(series: dict[str, list[tuple[float, float]]], theme: Theme) -> Figure:
    figure, axes = new_figure(2.9)
    styles = ("-", "--", "-.", ":")
    for index, (name, pairs) in enumerate(series.items()):
        axes.plot(
            *zip(*pairs, strict=True),
            color=theme.cycle[index % len(theme.cycle)],
            linestyle=styles[index // len(theme.cycle) % len(styles)],
            linewidth=1.4,
            label=shorten(name, 24),
        )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.set_xlabel("training step")
    axes.set_ylabel("assignments dropped")
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    axes.yaxis.set_major_formatter(lambda y, _: percent(y))
    if len(series) <= 16:
        axes.legend(loc="upper right", ncols=2 if len(series) > 6 else 1, fontsize=8)
    return figure


def drop_images(side: Mapping[str, Any], slug: str) -> list[Image]:
    """Return the figure of dropped assignments over training, or nothing when none was ever dropped."""
    series = drop_series(side)
    if not any(value for pairs in series.values() for _, value in pairs):
        return []
    last = {name: pairs[-1][1] for name, pairs in series.items()}
    worst = max(last, key=lambda name: last[name])
    words = f"at the end the most is {percent(last[worst])}, in {worst}"
    return [
        render(
            f"dropped_{slug}".rstrip("_"),
            lambda theme: _draw_drops(series, theme),
            alt=f"Share of assignments dropped over training, one line per router; {words}.",
            caption=f"<b>Dropped assignments</b>, one line per router; {escape(words)}.",
        )
    ]
