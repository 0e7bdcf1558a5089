"""Look of the figures, light and dark, and their rendering without any global state of matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

WIDTH = 4.4  # inches: 10 points stay legible where a phone shows the figure 340 pixels wide
DOTS = 200


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance. Blue and orange stay apart for every common colour-vision deficiency."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    low: str
    neutral: str
    high: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2128",
    muted="#59636e",
    grid="#e4e7eb",
    sparse=("#0067b0", "#009e8e", "#5b4bb5", "#4aa3df", "#7a8b00", "#8c3f8f"),
    dense=("#d55e00", "#8f6b00", "#a8475f"),
    low="#0067b0",
    neutral="#f3f4f6",
    high="#d55e00",
    cycle=("#0067b0", "#d55e00", "#009e73", "#b0508c", "#8f6b00", "#4aa3df", "#5b4bb5", "#59636e"),
)
DARK = Theme(
    name="dark",
    paper="#161b22",
    ink="#e6edf3",
    muted="#9aa5b1",
    grid="#2b323b",
    sparse=("#5cb3f0", "#3fd0b8", "#a99cf5", "#8fd3ff", "#c3d34a", "#dd94df"),
    dense=("#ff9a4d", "#e3c04f", "#f08aa3"),
    low="#4aa8ec",
    neutral="#262d36",
    high="#ff9a4d",
    cycle=("#5cb3f0", "#ff9a4d", "#3fd0a0", "#e58fc4", "#e3c04f", "#8fd3ff", "#a99cf5", "#9aa5b1"),
)


THEMES = (LIGHT, DARK)


@dataclass(frozen=True)
class Image:
    """A rendered figure: file name without ending, what it shows in words, and the PNG of each theme."""

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        # Names come from the result: a dollar sign in one of them is no formula.
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
    }


def new_figure(height: float = 3.1, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure that pyplot does not know, so that nothing stays open, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def colours(names: Sequence[str], sparse: Callable[[str], bool], theme: Theme) -> dict[str, str]:
    """Return one colour per side: sparse sides in cool hues, dense sides in warm ones."""
    chosen: dict[str, str] = {}
    seen = {True: 0, False: 0}
    for name in names:
        kind = sparse(name)
        wheel = theme.sparse if kind else theme.dense
        chosen[name] = wheel[seen[kind] % len(wheel)]
        seen[kind] += 1
    return chosen


def few_ticks(count: int = 4, integer: bool = False) -> Locator:
    """Return a locator of at most `count` steps at round numbers, or at whole ones."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=count, min_n_ticks=1, integer=integer)


def render(name: str, draw: Callable[[Theme], Figure], *, alt: str, caption: str) -> Image:
    """Draw a figure in both themes. `caption` is HTML; `alt` is plain text.

    Settings hold inside a context and the figures belong to no manager: the caller's backend, style and open
    figures are as before.
    """
    from matplotlib import rc_context

    images = []
    for theme in THEMES:
        settings: Any = _settings(theme)
        with rc_context(settings), warnings.catch_warnings():
            # A script that the bundled font lacks is drawn as boxes; the text beside it is complete.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            buffer = io.BytesIO()
            draw(theme).savefig(buffer, format="png")
            images.append(buffer.getvalue())
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return Image(safe, alt, caption, images[0], images[-1])


def shorten(text: str, limit: int = 22) -> str:
    """Return a label that fits; the middle is left out of a long one."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return text[:head] + "…" + text[len(text) - (limit - 1 - head) :]
