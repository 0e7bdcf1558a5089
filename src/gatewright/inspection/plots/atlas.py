"""Heat maps of an inspection: every layer's load in one, and who is selected with whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import load_share
from ..record import number, rows, table
from ..words import escape, percent
from .heat import matrix, reach, share_map
from .theme import Image, Theme, few_ticks, render, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MATRICES = 12  # more figures than this are no help to a reader; all numbers stand in the result


def loads_by_size(side: Mapping[str, Any]) -> dict[int, tuple[list[str], np.ndarray]]:
    """Return for each number of experts the routers that have it and their loads [routers, E]."""
    found: dict[int, tuple[list[str], list[np.ndarray]]] = {}
    for name, counts in table(side, "inspected", "counts").items():
        array = matrix([counts])
        if array is not None:
            names, loads = found.setdefault(array.shape[1], ([], []))
            names.append(name)
            loads.append(load_share(array[0]))
    return {size: (names, np.stack(loads)) for size, (names, loads) in found.items()}


def _draw_loads(names: list[str], loads: np.ndarray, title: str, theme: Theme) -> Figure:
    experts = loads.shape[1]
    even = 1 / experts
    columns = np.arange(experts + 1) - 0.5
    figure, axes = share_map(columns, loads, even, reach([loads], even), theme, 1.3 + 0.16 * len(names))
    axes.set_title(shorten(title, 44))
    axes.set_xlabel("expert")
    every = -(-len(names) // 24)
    axes.set_yticks(range(0, len(names), every), [shorten(name, 20) for name in names[::every]], fontsize=7.5)
    axes.xaxis.set_major_locator(few_ticks(8, integer=True))
    axes.invert_yaxis()
    return figure


def load_map_images(side: Mapping[str, Any], slug: str = "") -> list[Image]:
    """Return one heat map, layer by expert, per number of experts."""
    images = []
    for size, (names, loads) in loads_by_size(side).items():
        most = np.unravel_index(int(loads.argmax()), loads.shape)
        words = f"the most is {percent(float(loads.max()))}, expert {most[1]} of {names[most[0]]}"
        images.append(
            render(
                f"load_map_{slug}{size}",
                lambda theme, a=names, b=loads, c=size: _draw_loads(  # type: ignore[misc]
                    a, b, f"load of {c} experts", theme
                ),
                alt=f"Share of assignments of each of {size} experts in {len(names)} layers. An even share "
                f"is {percent(1 / size)}; {words}.",
                caption=f"<b>{size} experts</b>: even share {percent(1 / size)}; {escape(words)}.",
            )
        )
    return images


def _draw_pairs(shares: np.ndarray, even: float, title: str, theme: Theme) -> Figure:
    experts = len(shares)
    columns = np.arange(experts + 1) - 0.5
    figure, axes = share_map(columns, shares, even, reach([shares], even), theme, 3.4)
    axes.set_title(shorten(title, 44))
    axes.set_xlabel("is selected too")
    axes.set_ylabel("of the tokens of expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(few_ticks(8, integer=True))
    axes.invert_yaxis()
    return figure


def pair_images(side: Mapping[str, Any], slug: str = "") -> list[Image]:
    """Return one heat map of co-activation, expert by expert, for routers spread evenly over the model."""
    known = {
        name: shares
        for name, value in table(side, "inspected", "coactivation").items()
        if (shares := matrix(value)) is not None and len(shares) > 1 and shares.any()
    }
    names = list(known)
    if len(names) > MOST_MATRICES:
        places = np.linspace(0, len(names) - 1, MOST_MATRICES).round().astype(int)
        names = [names[place] for place in places]
    images = []
    for name in names:
        shares = known[name]
        selected = number(side, "inspected", "num_selected", name) or 2
        even = min(max((selected - 1) / (len(shares) - 1), 1e-6), 1.0)
        pairs = rows(side, "inspected", "pairs", name)
        strongest = (
            f"{percent(pairs[0][2])} of the tokens of {pairs[0][0]} select {pairs[0][1]}" if pairs else ""
        )
        images.append(
            render(
                f"pairs_{slug}{name}",
                lambda theme, a=shares, b=even, c=name: _draw_pairs(a, b, c, theme),  # type: ignore[misc]
                alt=f"Co-activation of {name}: of the tokens that select one expert, the share that select "
                f"another too. By chance {percent(even)}. Strongest: {strongest}.",
                caption=f"<b>{escape(name)}</b>: chance {percent(even)}. Strongest: {escape(strongest)}.",
            )
        )
    return images
