"""The sections of the page, each from the record alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import metrics
from .markup import command, figures, html_table, missing, paragraph, section
from .plots.bars import domain_images
from .plots.curves import curve_images, loss_images
from .plots.heat import (
    chance_level,
    drop_images,
    drop_series,
    load_images,
    load_series,
    matrix,
    specialisation_images,
)
from .plots.summary import scaling_images, small_data_images, triangle_images
from .plots.theme import Image
from .record import Record, mean, number, rows, table, text
from .tables import claims_table, domains_table, facts_table, settings_table, shares, sides_table
from .tokens import token_section
from .verdict import comparisons, speedups
from .words import escape, percent, times


@dataclass
class Page:
    """Sections in order, and the images that belong beside the page."""

    record: Record
    bodies: list[tuple[str, str, str]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def show(self, images: list[Image]) -> str:
        """Keep images for the folder and return them as figures."""
        self.images += images
        return figures(images)

    def add(self, anchor: str, title: str, body: str) -> None:
        self.bodies.append((anchor, title, body))

    @property
    def html(self) -> str:
        return "".join(section(*body) for body in self.bodies)

    @property
    def links(self) -> str:
        return "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in self.bodies)


def slug(name: str) -> str:
    """Return a name that is safe in a file name and an id."""
    return (
        "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name).strip("-")
        or "side"
    )


def step_time(record: Record) -> str:
    """Return the sentence on the ratio of step times, as measured."""
    ratios = [number(item, "step_time_ratio", "median") for item in record.headline]
    ratio = mean(ratios)
    if ratio is None:
        return "Step-time ratio sparse/dense: not recorded."
    low = [number(item, "step_time_ratio", "low") for item in record.headline]
    high = [number(item, "step_time_ratio", "high") for item in record.headline]
    known_low, known_high = [x for x in low if x is not None], [x for x in high if x is not None]
    interval = (
        f" (from {times(min(known_low))} to {times(max(known_high))})" if known_low and known_high else ""
    )
    word = "longer than" if ratio > 1.005 else "shorter than" if ratio < 0.995 else "as long as"
    return (
        f"A sparse step takes {times(ratio)} the time of a dense step{interval}: it is {word} a dense step. "
        "Seconds are tokens times this ratio."
    )


def curves(page: Page) -> None:
    """Add the three curves with the speed-up, and what the clock says."""
    record = page.record
    body = page.show(curve_images(record)) or missing("Curves of validation loss")
    if record.headline:
        words = []
        for key, label in (
            ("tokens", "tokens"),
            ("flops", "training FLOPs"),
            ("seconds", "measured seconds"),
        ):
            ratio, note = speedups(record, key)
            if ratio is None:
                words.append(f"by {label} never")
            else:
                words.append(f"by {label} {times(ratio)}" + (f" ({note})" if note else ""))
        body += paragraph(
            "<b>Speed-up to the dense twin’s final quality:</b> "
            + escape("; ".join(words))
            + ". Above 1 sparse gets "
            "there first; below 1 it needs more than dense did."
        )
        body += paragraph(f"<b>On the clock:</b> {escape(step_time(record))} {escape(shares(record))}")
    if any(
        number(point, "valid_bpb_ema") is not None for run in record.runs for point in rows(run.side, "curve")
    ):
        body += paragraph("Dotted lines: the same model with averaged weights.", "note")
    if any(text(point, "weights") == "averaged" for run in record.runs for point in rows(run.side, "curve")):
        body += paragraph(
            "Points before the end are of averaged weights, where recorded as such, so that those at a "
            "constant rate compare; the last is of the model as trained.",
            "note",
        )
    body += paragraph(
        "Lower is better. "
        + ("One line per seed, the first thicker. " if len(record.seeds) > 1 else "")
        + "Early points above the frame are cut.",
        "note",
    )
    page.add("curves", "Tokens, compute and time", body + command(record.command))


def sides(page: Page) -> None:
    """Add the table of the sides and, for a race, every single seed."""
    seeds = comparisons(page.record)
    title = (
        "The sides and every seed" if seeds else "The model" if len(page.record.names) < 2 else "The sides"
    )
    page.add("sides", title, sides_table(page.record) + seeds + command(page.record.command))


def domains(page: Page) -> None:
    """Add final losses by domain."""
    record = page.record
    body = domains_table(record)
    body = (
        body + page.show(domain_images(record)) + command(record.command)
        if body
        else missing("Losses by domain")
    )
    page.add("domains", "Loss by domain", body)


def _load_table(side: Mapping[str, Any]) -> str:
    lines = []
    for name in table(side, "load_over_time", "routers"):
        found = load_series(side, name)
        if found is None:
            continue
        final = found[1][-1]
        lines.append(
            [
                name,
                len(final),
                f"{float(metrics.max_over_mean(final)):.2f}",
                f"{float(metrics.load_variation(final)):.3f}",
                f"{float(metrics.load_entropy(final)):.4f}",
                int((final == 0).sum()),
            ]
        )
    headers = [
        "Router",
        "Experts",
        "Largest / mean",
        "Coefficient of variation",
        "Entropy / log E",
        "Unused experts",
    ]
    return (
        html_table(headers, lines, caption="Balance at the last recorded step (even: 1, 0, 1, 0)")
        if lines
        else ""
    )


def favourites(side: Mapping[str, Any]) -> str:
    """Return the table of the expert that most tokens of each domain select, per router."""
    domain_names = [str(name) for name in rows(side, "specialisation", "domains")]
    lines = []
    for name, value in table(side, "specialisation", "routers").items():
        found = matrix(value)
        if found is None or len(found) != len(domain_names):
            continue
        level = chance_level(side, name, found)
        best = found.argmax(axis=1)
        cells = [f"{best[row]}: {percent(float(found[row, best[row]]), 0)}" for row in range(len(found))]
        lines.append([name, percent(level), *cells])
    caption = "Expert that most tokens of each domain select, and their share"
    return html_table(["Router", "Chance", *domain_names], lines, caption=caption) if lines else ""


def _drops(page: Page, side: Mapping[str, Any], prefix: str) -> str:
    images = drop_images(side, prefix)
    if images:
        return page.show(images)
    if drop_series(side):
        return paragraph("No assignment was dropped at any recorded step.")
    return missing("Dropped assignments")


def _routing_of(page: Page, name: str, prefix: str) -> str:
    side = page.record.first(name)
    load = page.show(load_images(side, prefix))
    special = page.show(specialisation_images(side, prefix))
    explained = paragraph(
        "Share of assignments that each expert receives. Neutral is an even share, orange more, blue less.",
        "note",
    )
    meaning = paragraph(
        "Domain specialisation (Muennighoff et al. 2024): the share of a domain’s tokens that have the "
        "expert among their selected ones. Under uniform choice every cell equals K/E, the neutral colour; "
        "orange is more than chance, blue less.",
        "note",
    )
    parts = [
        "<h3>Load over training</h3>" + (explained + load + _load_table(side) if load else missing("Load")),
        "<h3>Dropped tokens</h3>" + _drops(page, side, prefix),
        "<h3>What the experts specialise in</h3>"
        + (meaning + special + favourites(side) if special else missing("Specialisation by domain")),
        "<h3>Where each token went</h3>" + token_section(side, slug(prefix)),
    ]
    return "".join(parts)


def routing(page: Page) -> None:
    """Add load, drops, specialisation and the coloured text of each sparse side, from its first seed."""
    record = page.record
    names = [name for name in record.names if record.is_sparse(name)]
    if not names:
        page.add("routing", "Where the tokens go", paragraph("No side of this record has a router."))
        return
    body = ""
    if len(record.seeds) > 1:
        body += paragraph(f"From seed {escape(record.of(names[0])[0].seed)}, the first recorded.", "note")
    for index, name in enumerate(names):
        prefix = f"{slug(name)}_" if len(names) > 1 else ""
        inner = _routing_of(page, name, prefix)
        if len(names) > 1:
            label = escape(record.label(name))
            opened = " open" if index == 0 else ""
            inner = f"<details{opened}><summary>{label}</summary>{inner}</details>"
        body += inner
    page.add("routing", "Where the tokens go", body + command(record.command))


def further(page: Page) -> None:
    """Add scaling, small data and the triangle where measured; name the flag of each that was not."""
    record, found, absent = page.record, "", ""
    base = "gatewright race"
    for title, images, flag in (
        ("Scaling with the number of experts", scaling_images(record), "--experts 2,4,8,16"),
        ("Small data", small_data_images(record), "--data-fraction 0.01,0.1,1"),
        ("Quality, compute and size", triangle_images(record), "--triangle"),
    ):
        claims = claims_table(record) if flag == "--triangle" else ""
        if images or claims:
            found += (
                f"<article><h3>{title}</h3>{page.show(images)}{claims}{command(record.command)}</article>"
            )
        else:
            absent += missing(title, f"{base} {flag}")
    page.add("further", "Further questions", (found and f'<div class="blocks">{found}</div>') + absent)


def making(page: Page) -> None:
    """Add how the result came about: command, training loss, settings, environment, data."""
    record = page.record
    body = command(record.command) or missing("The command")
    body += f'<div class="blocks">{page.show(loss_images(record))}{facts_table(record)}</div>'
    body += f"<details><summary>Settings of each side</summary>{settings_table(record)}</details>"
    page.add("made", "How this was made", body)


def build(record: Record) -> Page:
    """Return the page of a race or of a training run."""
    page = Page(record)
    curves(page)
    sides(page)
    domains(page)
    routing(page)
    if record.is_race:
        further(page)
    making(page)
    return page


__all__ = ["Page", "build", "slug", "text"]
