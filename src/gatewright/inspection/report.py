"""Writes the report: one self-contained page, and its figures as PNG files beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..errors import RunFailure
from .inspected import build_inspection, inspection_headline
from .plots.theme import Image
from .record import Record, text
from .sections import build
from .tokens import count_experts, palette_style, read_views
from .verdict import race_headline, train_headline
from .words import NONE, escape, moment, plural


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _replace(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a full disk leaves the former file whole."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFailure(
            f"cannot write {path}: {error.strerror or error}; the result file itself is untouched"
        ) from error


def _style(record: Record) -> str:
    counts = [count_experts(run.side, views) for run in record.runs if (views := read_views(run.side))]
    return _asset("report.css") + (palette_style(max(counts)) if counts else "")


def render_page(result: Mapping[str, Any]) -> tuple[str, list[Image]]:
    """Return the page as HTML and the figures that belong beside it. Writes nothing.

    Raises: UserError for a mapping that is no result of a race, a training run or an inspection.
    """
    record = Record.read(result)
    if record.is_inspection:
        page, headline, kind = build_inspection(record), inspection_headline(record), "Where tokens go"
    else:
        page = build(record)
        headline = race_headline(record) if record.is_race else train_headline(record)
        kind = "Sparse against dense" if record.is_race else "Training run"
    data = text(result, "data", "name")
    seeds = [] if record.is_inspection else [plural(len(record.seeds), "seed")]
    about = [moment(text(result, "created")), *seeds, f"data: {data or NONE}"]
    html = Template(_asset("report.html")).substitute(
        title=escape(record.title),
        kind=kind,
        about=escape(" · ".join(part for part in about if part)),
        links=f'<a href="#verdict">{"Summary" if record.is_inspection else "Verdict"}</a>' + page.links,
        style=_style(record),
        script=_asset("tokens.js"),
        body=headline + page.html,
        version=escape(text(result, "environment", "gatewright")),
    )
    return html, page.images


def write_report(result: Mapping[str, Any], out_dir: Path) -> Path:
    """Write `report.html` and its PNG files from a result and return the page's path.

    The page needs no network and no other file. Absent or null parts of the result are named as not recorded.

    Args: result: the content of race.json, train.json or inspect.json; out_dir: created where it is missing.
    Raises: UserError for another schema; RunFailure where the folder cannot be written.
    """
    html, images = render_page(result)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailure(f"cannot create {out_dir}: {error.strerror or error}") from error
    for image in images:
        _replace(out_dir / f"{image.name}.png", image.light)
    page = out_dir / "report.html"
    # Lone surrogates can stand in a byte-level piece; HTML has no way to write them.
    _replace(page, html.encode("utf-8", errors="replace"))
    return page
