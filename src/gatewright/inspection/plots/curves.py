"""Curves against tokens, training FLOPs and seconds, with the speed-up to the dense twin's final quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..record import Record, Run, mean, number, rows, text
from ..words import escape, percent, tick, times
from .theme import Image, Theme, colours, few_ticks, new_figure, render, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# key in the curve, key of the speed-up, axis label
AXES = (
    ("tokens", "tokens", "training tokens"),
    ("train_flops", "flops", "training FLOPs"),
    ("seconds", "seconds", "measured training seconds"),
)


def points(run: Run, key: str, value: str = "valid_bpb") -> list[tuple[float, float]]:
    """Return the recorded (x, value) pairs of one run's curve, closed by its final point."""
    pairs = [(number(row, key), number(row, value)) for row in rows(run.side, "curve")]
    if value == "valid_bpb":
        pairs.append((number(run.side, "final", key), number(run.side, "final", "valid_bpb")))
    known = {x: y for x, y in pairs if x is not None and y is not None}
    return sorted(known.items())


def _limits(curves: list[list[tuple[float, float]]], extra: list[float]) -> tuple[float, float] | None:
    """Return y limits that leave out the steep start, or None where there is nothing to frame."""
    finals = [curve[-1][1] for curve in curves if curve]
    if not finals:
        return None
    late = [y for curve in curves for x, y in curve if curve[-1][0] > 0 and x >= 0.12 * curve[-1][0]]
    low, high = min(finals + extra + late), max(finals + extra + late)
    room = max(high - low, 0.02)
    return low - 0.24 * room, high + 0.06 * room


def _mark_speedup(axes: Axes, record: Record, key: str, speedup_key: str, theme: Theme) -> None:
    """Draw the dense twin's final quality as a line, and the way from there back to the sparse crossing."""
    pairs = record.headline
    if not pairs:
        return
    dense = text(pairs[0], "dense")
    level = mean(record.values(dense, "final", "valid_bpb"))
    end = mean(record.values(dense, "final", key))
    if level is None:
        return
    colour = colours(record.names, record.is_sparse, theme).get(dense, theme.dense[0])
    axes.axhline(level, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1.5)
    ratios = [number(item, "speedup", speedup_key) for item in pairs]
    ratio = mean(ratios)
    if ratio is None or end is None or ratio <= 0:
        axes.text(
            0.02, level, "never reached by the sparse side", transform=axes.get_yaxis_transform(),
            ha="left", va="top", fontsize=8.5, color=theme.muted,
        )  # fmt: skip
        return
    start = end / ratio
    axes.annotate(
        "", xy=(start, level), xytext=(end, level), zorder=4,
        arrowprops={"arrowstyle": "-|>", "color": theme.ink, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    axes.plot([end], [level], marker="o", markersize=5, color=colour, zorder=5)
    missed = sum(value is None for value in ratios)
    word = times(ratio) + ("" if ratio >= 1 else " (slower)") + (f", {missed} never" if missed else "")
    axes.annotate(
        word, xy=((start + end) / 2, level), xytext=(0, -11), textcoords="offset points", zorder=6,
        ha="center", va="top", fontsize=10, fontweight="bold", color=theme.ink,
    )  # fmt: skip


def _draw_curve(record: Record, axis: tuple[str, str, str], theme: Theme) -> Figure:
    key, speedup_key, label = axis
    figure, axes = new_figure(3.4)
    paint = colours(record.names, record.is_sparse, theme)
    drawn: list[list[tuple[float, float]]] = []
    for name in record.names:
        marker = "o" if record.is_sparse(name) else "s"
        for index, run in enumerate(record.of(name)):
            curve = points(run, key)
            averaged = points(run, key, "valid_bpb_ema")
            drawn += [line for line in (curve, averaged) if line]
            if averaged:
                axes.plot(*zip(*averaged, strict=True), color=paint[name], linewidth=1.1, linestyle=":")
            if curve:
                first = shorten(record.short(name), 26) if index == 0 else None
                thin = 1.9 if index == 0 else 1.0
                axes.plot(*zip(*curve, strict=True), color=paint[name], linewidth=thin, label=first)
                axes.plot(*curve[-1], color=paint[name], marker=marker, markersize=4.5)
    levels = [value for item in record.headline[:1] if (value := mean(record.values(text(item, "dense"),
              "final", "valid_bpb"))) is not None]  # fmt: skip
    if limits := _limits(drawn, levels):
        axes.set_ylim(*limits)
        axes.set_xlim(left=0)
    _mark_speedup(axes, record, key, speedup_key, theme)
    axes.grid(axis="y")
    axes.set_xlabel(label)
    axes.set_ylabel("validation bits per byte")
    axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    if drawn:
        axes.legend(loc="upper right", handlelength=1.4)
    return figure


def curve_images(record: Record) -> list[Image]:
    """Return the figures of validation bits per byte against each measure that some side recorded."""
    images = []
    for axis in AXES:
        key, speedup_key, label = axis
        if not any(points(run, key) for run in record.runs):
            continue
        words = f"Validation bits per byte against {label}, one line per side and seed."
        note = ""
        if pairs := record.headline:
            ratio = mean([number(item, "speedup", speedup_key) for item in pairs])
            reached = (
                f"the sparse side reaches it at {times(ratio)} the speed"
                if ratio is not None
                else "the sparse side never reaches it"
            )
            words += f" Dashed: the dense side's final quality; {reached}."
            way = (
                "the arrow runs to where sparse reached it"
                if ratio is not None
                else "sparse never reached it"
            )
            note = f" Dashed: the dense twin's final quality; {way}."
        images.append(
            render(
                f"curve_{key}",
                lambda theme, axis=axis: _draw_curve(record, axis, theme),  # type: ignore[misc]
                alt=words,
                caption=f"<b>Against {escape(label)}.</b>{note}",
            )
        )
    return images


def _smooth(values: list[float], window: int) -> list[float]:
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _draw_losses(record: Record, theme: Theme) -> Figure:
    figure, axes = new_figure(3.0)
    paint = colours(record.names, record.is_sparse, theme)
    tail: list[float] = []
    for name in record.names:
        for index, run in enumerate(record.of(name)):
            pairs = [(number(row, "tokens"), number(row, "loss")) for row in rows(run.side, "train_log")]
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            if not known:
                continue
            smooth = _smooth([y for _, y in known], max(1, len(known) // 40))
            tail += smooth[len(smooth) // 12 :]
            first = shorten(record.short(name), 26) if index == 0 else None
            alone = "o" if len(known) == 1 else None
            axes.plot(
                [x for x, _ in known], smooth, color=paint[name], linewidth=1.2, label=first, marker=alone
            )
    room = max(max(tail) - min(tail), 0.02)
    axes.set_ylim(min(tail) - 0.05 * room, max(tail) + 0.06 * room)
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("training loss")
    axes.legend(loc="upper right", handlelength=1.4)
    return figure


def loss_images(record: Record) -> list[Image]:
    """Return the figure of training loss, smoothed over a fortieth of the log, where one was recorded."""
    logged = [
        row for run in record.runs for row in rows(run.side, "train_log") if number(row, "loss") is not None
    ]
    if not any(number(row, "tokens") is not None for row in logged):
        return []
    return [
        render(
            "train_loss",
            lambda theme: _draw_losses(record, theme),
            alt="Training loss against training tokens, one line per side and seed.",
            caption=f"<b>Training loss</b>, smoothed over {percent(1 / 40)} of the log. Early points above "
            "the frame are cut.",
        )
    ]
