"""Figures over several runs: scaling with experts, small data, quality against compute and size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..record import Record, mean, number, rows, text
from ..words import bits, flops, percent, scaled, tick
from .theme import Image, Theme, few_ticks, new_figure, render, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def grouped(items: Iterable[Mapping[str, Any]], key: str, value: str) -> dict[float, list[float]]:
    """Return the values at each x, in order of x; entries without either number are left out."""
    found: dict[float, list[float]] = {}
    for item in items:
        x, y = number(item, key), number(item, value)
        if x is not None and y is not None:
            found.setdefault(x, []).append(y)
    return dict(sorted(found.items()))


def _line(
    axes: Axes, found: dict[float, list[float]], colour: str, label: str | None, style: str = "-"
) -> None:
    middle = [sum(values) / len(values) for values in found.values()]
    axes.plot(list(found), middle, color=colour, linestyle=style, marker="o", markersize=4.5, label=label)
    for x, values in found.items():
        if len(values) > 1:
            axes.plot([x] * len(values), values, linestyle="", marker="_", markersize=9, color=colour)


def _log_ticks(axes: Axes, ticks: list[float], labels: list[str]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels)


def dense_level(record: Record) -> float | None:
    """Return the mean final bits per byte of the dense side that the verdict is about."""
    pairs = record.headline
    return mean(record.values(text(pairs[0], "dense"), "final", "valid_bpb")) if pairs else None


def _draw_scaling(record: Record, theme: Theme) -> Figure:
    figure, axes = new_figure(3.2)
    found = grouped(rows(record.result, "scaling"), "num_experts", "valid_bpb")
    _line(axes, found, theme.sparse[0], "sparse, equal active FLOPs")
    level = dense_level(record)
    if level is not None:
        axes.axhline(level, color=theme.dense[0], linestyle=(0, (4, 3)), linewidth=1.2, label="dense twin")
    _log_ticks(axes, list(found), [f"{x:.0f}" for x in found])
    axes.grid(axis="y")
    axes.set_xlabel("number of experts")
    axes.set_ylabel("validation bits per byte")
    axes.legend(loc="best")
    return figure


def scaling_images(record: Record) -> list[Image]:
    """Return the figure of final quality against the number of experts, where it was measured."""
    found = grouped(rows(record.result, "scaling"), "num_experts", "valid_bpb")
    if not found:
        return []
    listed = "; ".join(f"{x:.0f} experts {bits(mean(values))}" for x, values in found.items())
    return [
        render(
            "scaling",
            lambda theme: _draw_scaling(record, theme),
            alt=f"Validation bits per byte against the number of experts: {listed}.",
            caption="<b>More experts, same active compute.</b>"
            + (" Bars: single seeds." if any(len(values) > 1 for values in found.values()) else ""),
        )
    ]


def _by_kind(record: Record) -> dict[str, dict[float, list[float]]]:
    items = [item for item in rows(record.result, "small_data") if isinstance(item, Mapping)]
    kinds = dict.fromkeys(text(item, "kind") or "unnamed" for item in items)
    found = {
        kind: grouped(
            [item for item in items if (text(item, "kind") or "unnamed") == kind], "fraction", "valid_bpb"
        )
        for kind in kinds
    }
    return {kind: values for kind, values in found.items() if values}


def _draw_small_data(record: Record, theme: Theme) -> Figure:
    figure, axes = new_figure(3.2)
    found = _by_kind(record)
    wheels = {True: iter(theme.dense * 9), False: iter(theme.sparse * 9)}
    for kind, values in found.items():
        is_dense = "dense" in kind
        _line(axes, values, next(wheels[is_dense]), shorten(kind, 26), "--" if is_dense else "-")
    ticks = sorted({x for values in found.values() for x in values})
    if all(x > 0 for x in ticks):
        _log_ticks(axes, ticks, [percent(x) for x in ticks])
    axes.grid(axis="y")
    axes.set_xlabel("share of the training text, same number of training tokens")
    axes.set_ylabel("validation bits per byte")
    axes.legend(loc="best")
    return figure


def small_data_images(record: Record) -> list[Image]:
    """Return the figure of final quality against the share of the training text, where it was measured."""
    found = _by_kind(record)
    if not found:
        return []
    listed = "; ".join(
        f"{kind} at {percent(x)}: {bits(mean(values))}"
        for kind, series in found.items()
        for x, values in series.items()
    )
    return [
        render(
            "small_data",
            lambda theme: _draw_small_data(record, theme),
            alt=f"Validation bits per byte against the share of the training text: {listed}.",
            caption="<b>Less text, seen more often.</b> Sparse models have more parameters to overfit with.",
        )
    ]


def triangle_points(record: Record) -> list[Mapping[str, Any]]:
    """Return the points of the triangle that hold both a quality and a training compute."""
    return [
        point
        for point in rows(record.result, "triangle", "points")
        if number(point, "valid_bpb") is not None and (number(point, "train_flops") or 0) > 0
    ]


def _draw_triangle(record: Record, theme: Theme) -> Figure:
    figure, axes = new_figure(3.6)
    known = triangle_points(record)
    sizes = [number(point, "total_parameters") or 0.0 for point in known]
    places = [(number(point, "train_flops") or 0.0, number(point, "valid_bpb") or 0.0) for point in known]
    middle = (min(x for x, _ in places) + max(x for x, _ in places)) / 2
    for point, size, place in zip(known, sizes, places, strict=True):
        name = text(point, "name")
        known_kind = text(point, "kind") or ("dense" if "dense" in name else "sparse")
        kind = record.is_sparse(name) if name in record.names else known_kind == "sparse"
        area = max(60.0, 1500 * size / (max(sizes) or 1.0))
        colour = theme.sparse[0] if kind else theme.dense[0]
        axes.scatter(*place, s=area, color=colour, alpha=0.55, edgecolor=theme.ink)
        active = number(point, "active_parameters")
        words = f"{shorten(name, 20)}\n{scaled(size or None)} total"
        words += f"\n{scaled(active)} active" if active is not None else ""
        side = 1 if place[0] <= middle else -1
        axes.annotate(
            words, place, xytext=(side * (area**0.5 / 2 + 5), 0), textcoords="offset points",
            ha="left" if side > 0 else "right", va="center", fontsize=8.5,
        )  # fmt: skip
    axes.margins(0.25, 0.3)
    axes.grid()
    axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("final bits per byte")
    return figure


def triangle_images(record: Record) -> list[Image]:
    """Return the figure of quality against compute, area showing total parameters, where it was measured."""
    known = triangle_points(record)
    if not known:
        return []
    listed = "; ".join(
        f"{text(point, 'name')}: {bits(number(point, 'valid_bpb'))} at {flops(number(point, 'train_flops'))}"
        f", {scaled(number(point, 'total_parameters'))} parameters"
        for point in known
    )
    return [
        render(
            "triangle",
            lambda theme: _draw_triangle(record, theme),
            alt=f"Quality, compute and size: {listed}.",
            caption="<b>Quality, compute and size.</b> Lower is better, further left is cheaper; the area of "
            "a disc is the number of total parameters.",
        )
    ]
