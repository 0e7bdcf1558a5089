"""The page of an inspection: load, dead experts, specialisation, co-activation and coloured texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import metrics
from .markup import command, html_table, missing, paragraph
from .plots.atlas import MOST_MATRICES, load_map_images, pair_images
from .plots.heat import chance_level, matrix, specialisation_images
from .record import Record, number, rows, table
from .sections import Page, favourites
from .tables import facts_table, settings_table
from .tokens import token_section
from .verdict import tile
from .words import escape, percent, plural, scaled


@dataclass(frozen=True)
class RouterLine:
    """One router in numbers. `entropy` is 1 and `largest` (over the mean) is 1 when even; `dead` lists the
    experts that no token selected; `special` is the largest share of a domain's tokens over chance.
    """

    name: str
    experts: int
    selected: int
    entropy: float
    largest: float
    dead: tuple[int, ...]
    special: float | None


def router_lines(side: Mapping[str, Any]) -> list[RouterLine]:
    """Return each inspected router in numbers, in the model's order."""
    lines = []
    for name, value in table(side, "inspected", "counts").items():
        counts = matrix([value])
        if counts is None:
            continue
        shares = matrix(table(side, "specialisation", "routers").get(name))
        special = None if shares is None else float(shares.max() / chance_level(side, name, shares))
        lines.append(
            RouterLine(
                name,
                counts.shape[1],
                int(number(side, "inspected", "num_selected", name) or 0),
                float(metrics.load_entropy(counts[0])),
                float(metrics.max_over_mean(counts[0])),
                tuple(np.flatnonzero(counts[0] == 0).tolist()),
                special,
            )
        )
    return lines


def few_ids(ids: tuple[int, ...], most: int = 8) -> str:
    """Return "2: 3, 7", the number of ids and the first of them; "0" for none."""
    shown = ", ".join(map(str, ids[:most])) + (", …" if len(ids) > most else "")
    return f"{len(ids)}: {shown}" if ids else "0"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _router_table(side: Mapping[str, Any]) -> str:
    lines = [
        [
            line.name,
            line.experts,
            line.selected,
            f"{line.entropy:.4f}",
            f"{line.largest:.2f}",
            few_ids(line.dead),
            _ratio(line.special),
        ]
        for line in router_lines(side)
    ]
    headers = [
        "Layer",
        "Experts",
        "Selected",
        "Entropy / log E",
        "Largest / mean",
        "Dead experts",
        "Strongest domain share / chance",
    ]
    caption = "Balance over all texts (even: 1 and 1); dead: selected by no token of them"
    return html_table(headers, lines, caption=caption) if lines else ""


def _pairs_table(side: Mapping[str, Any]) -> str:
    lines = [
        [name, *(f"{i} → {j}: {percent(share, 0)}" for i, j, share in value[:4])]
        for name, value in table(side, "inspected", "pairs").items()
        if isinstance(value, list) and value
    ]
    width = max((len(line) for line in lines), default=0)
    headers = ["Layer", *(f"{place}." for place in range(1, width))]
    caption = "Strongest pairs: of the tokens of the first expert, the share that select the second too"
    filled = [line + ["–"] * (width - len(line)) for line in lines]
    return html_table(headers, filled, caption=caption) if lines else ""


def _load(page: Page, side: Mapping[str, Any]) -> None:
    images = page.show(load_map_images(side))
    note = paragraph(
        "Share of assignments that each expert receives, a row per layer. Neutral is an even share, orange "
        "more, blue less.",
        "note",
    )
    page.add(
        "load", "Load of every layer", note + images + _router_table(side) if images else missing("Load")
    )


def _special(page: Page, side: Mapping[str, Any]) -> None:
    images = page.show(specialisation_images(side, ""))
    meaning = paragraph(
        "Domain specialisation (Muennighoff et al. 2024): the share of a domain’s tokens that have the "
        "expert among their selected ones. Under uniform choice every cell equals K/E, the neutral colour; "
        "orange is more than chance, blue less.",
        "note",
    )
    body = meaning + images + favourites(side) if images else missing("Specialisation by domain")
    page.add("specialisation", "What the experts specialise in", body)


def _together(page: Page, side: Mapping[str, Any]) -> None:
    images = page.show(pair_images(side))
    body = images + _pairs_table(side)
    if len(rows(side, "routers")) > MOST_MATRICES and images:
        body += paragraph(f"Figures of {MOST_MATRICES} layers, spread evenly over the model.", "note")
    words = "No token selected two experts." if table(side, "inspected", "pairs") else ""
    page.add(
        "pairs",
        "Which experts are selected together",
        body or (paragraph(words) if words else missing("Co-activation")),
    )


def build_inspection(record: Record) -> Page:
    """Return the page of an inspection."""
    page = Page(record)
    side = record.first(record.names[0]) if record.names else {}
    _load(page, side)
    _special(page, side)
    _together(page, side)
    page.add("text", "Where each token went", token_section(side, ""))
    body = (command(record.command) or missing("The command")) + facts_table(record)
    body += f"<details><summary>Settings of the model</summary>{settings_table(record)}</details>"
    page.add("made", "How this was made", body)
    return page


def inspection_headline(record: Record) -> str:
    """Return the summary card and its tiles."""
    side = record.first(record.names[0]) if record.names else {}
    lines = router_lines(side)
    if not lines:
        return (
            '<section id="verdict"><div class="verdict open"><h2>No router is recorded</h2></div></section>'
        )
    dead, total = sum(len(line.dead) for line in lines), sum(line.experts for line in lines)
    worst = max(lines, key=lambda line: line.largest)
    read = number(side, "inspected", "tokens")
    names = rows(side, "specialisation", "domains")
    words = (
        f"{record.label(record.names[0])}: {plural(len(lines), 'sparse layer')} over {scaled(read)} tokens "
        f"of {plural(len(names), 'domain')}. The least even layer is {worst.name}: its busiest expert takes "
        f"{worst.largest:.2f} times the mean load. {dead} of {total} experts were selected by no token."
    )
    tiles = [
        tile(scaled(read), "tokens read"),
        tile(str(len(lines)), "sparse layers"),
        tile(f"{worst.largest:.2f}", "largest load / mean", worst.name),
        tile(f"{min(line.entropy for line in lines):.3f}", "least entropy / log E"),
        tile(f"{dead} of {total}", "experts without a token"),
        tile(scaled(number(side, "total_parameters")), "total parameters"),
    ]
    card = f'<div class="verdict open"><h2>Summary</h2><p class="lead">{escape(words)}</p></div>'
    return f'<section id="verdict">{card}<ul class="tiles">{"".join(tiles)}</ul></section>'


def summary_text(side: Mapping[str, Any]) -> str:
    """Return a line per router for a terminal."""
    lines = router_lines(side)
    width = max((len(line.name) for line in lines), default=5)
    heading = f"{'layer':{width}}  experts  selected  entropy  largest/mean  domain/chance  dead"
    found = [
        f"{line.name:{width}}  {line.experts:7d}  {line.selected:8d}  {line.entropy:7.4f}  "
        f"{line.largest:12.2f}  {_ratio(line.special):>13}  {few_ids(line.dead)}"
        for line in lines
    ]
    return "\n".join([heading, *found])
