"""Final losses by domain as bars, and the gap of each domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..record import Record, mean, number, text
from ..words import signed
from .theme import Image, Theme, colours, few_ticks, new_figure, render, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def domain_gaps(record: Record) -> dict[str, list[float]]:
    """Return dense minus sparse bits per byte of each domain, one per seed (positive: sparse better)."""
    gaps: dict[str, list[float]] = {}
    for pair in record.headline:
        seed = text(pair, "seed")
        found = {run.name: run.side for run in record.runs if run.seed == seed}
        sparse, dense = found.get(text(pair, "sparse")), found.get(text(pair, "dense"))
        for domain in record.domains:
            ours = number(sparse, "final", "domains", domain)
            theirs = number(dense, "final", "domains", domain)
            if ours is not None and theirs is not None:
                gaps.setdefault(domain, []).append(theirs - ours)
    return gaps


def _draw_bars(record: Record, domains: list[str], names: list[str], theme: Theme) -> Figure:
    step = 0.8 / len(names)
    figure, axes = new_figure(0.9 + len(domains) * max(0.42, 0.2 * len(names)))
    paint = colours(record.names, record.is_sparse, theme)
    longest = 0.0
    for index, name in enumerate(names):
        for line, domain in enumerate(domains):
            value = mean(record.values(name, "final", "domains", domain))
            if value is None:
                continue
            longest = max(longest, value)
            height = line - 0.4 + (index + 0.5) * step
            label = shorten(record.short(name), 26) if line == 0 else None
            axes.barh(height, value, height=step * 0.86, color=paint[name], label=label)
            axes.text(value, height, f" {value:.3f}", va="center", ha="left", fontsize=8, color=theme.muted)
    axes.set_xlim(0, max(longest, 1e-3) * 1.14)
    axes.set_yticks(range(len(domains)), [shorten(name, 18) for name in domains])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("final bits per byte (lower is better)")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _draw_gaps(gaps: dict[str, list[float]], theme: Theme) -> Figure:
    figure, axes = new_figure(0.9 + 0.42 * len(gaps))
    for line, values in enumerate(gaps.values()):
        middle = sum(values) / len(values)
        axes.barh(line, middle, height=0.6, color=theme.sparse[0] if middle > 0 else theme.dense[0])
        if len(values) > 1:
            axes.plot(values, [line] * len(values), linestyle="", marker="|", markersize=11, color=theme.ink)
    everything = [0.0, *(value for values in gaps.values() for value in values)]
    room = max(0.08 * (max(everything) - min(everything)), 1e-5)
    axes.set_xlim(min(everything) - room, max(everything) + room)
    axes.axvline(0, color=theme.muted, linewidth=1)
    axes.set_yticks(range(len(gaps)), [shorten(name, 18) for name in gaps])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("dense − sparse, bits per byte (right: sparse better)")
    axes.xaxis.label.set_fontsize(8.5)
    axes.xaxis.set_major_locator(few_ticks(3))
    return figure


def domain_images(record: Record) -> list[Image]:
    """Return the bars of final loss by domain, and of the gap where a race compared two sides."""
    images = []
    finals = {
        domain: [
            name for name in record.names if mean(record.values(name, "final", "domains", domain)) is not None
        ]
        for domain in record.domains
    }
    domains = [domain for domain, names in finals.items() if names]
    compared = {text(item, key) for item in record.headline for key in ("sparse", "dense")}
    names = [name for name in record.names if name in compared] or record.names[:4]
    if domains:
        images.append(
            render(
                "domains",
                lambda theme: _draw_bars(record, domains, names, theme),
                alt="Final bits per byte of each side on each domain, as bars from zero.",
                caption="<b>Final loss by domain</b>, mean over seeds.",
            )
        )
    if gaps := domain_gaps(record):
        better = sum(sum(values) > 0 for values in gaps.values())
        middle = {domain: sum(values) / len(values) for domain, values in gaps.items()}
        listed = "; ".join(f"{domain} {signed(value)}" for domain, value in middle.items())
        images.append(
            render(
                "domain_gap",
                lambda theme: _draw_gaps(gaps, theme),
                alt=f"Gap by domain, dense minus sparse, in bits per byte: {listed}.",
                caption=f"<b>Gap by domain</b>: sparse is better on {better} of {len(gaps)} "
                "domains." + (" Ticks: single seeds." if len(record.headline) > 1 else ""),
            )
        )
    return images
