"""Small pieces of HTML: tables, figures, notes. Everything that is not `Html` is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

from .plots.theme import Image
from .words import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def cell(value: object) -> str:
    """Return a value as HTML: escaped, unless it is `Html`."""
    return str(value) if isinstance(value, Html) else escape(value)


def with_note(words: str, note: str) -> Html:
    """Return a cell's text with a smaller line below it; an empty note leaves the text alone."""
    return Html(f"{escape(words)}<small>{escape(note)}</small>" if note else escape(words))


def html_table(
    headers: Sequence[object], lines: Iterable[Sequence[object]], *, caption: str, wide: bool = True
) -> str:
    """Return a table whose first column names the row; it scrolls inside its own box on a narrow screen.

    `caption` is plain text, read out before the table and shown above it.
    """
    head = "".join(f'<th scope="col">{cell(name)}</th>' for name in headers)
    body = "".join(
        f'<tr><th scope="row">{cell(line[0])}</th>'
        + "".join(f"<td>{cell(value)}</td>" for value in line[1:])
        + "</tr>"
        for line in lines
    )
    style = "" if wide else " narrow"
    return (
        f'<div class="table{style}"><p class="caption">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _size(image: bytes) -> tuple[int, int]:
    """Read width and height from a PNG's header, so that the page does not jump while it is laid out."""
    return int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")


def figure(image: Image) -> str:
    """Return a figure with its PNG inlined, light and dark."""
    width, height = _size(image.light)
    attributes = f'width="{width}" height="{height}" alt="{escape(image.alt)}"'
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(image.dark)}">'
        f'<img src="{_data(image.light)}" {attributes}></picture>'
        f"<figcaption>{image.caption}</figcaption></figure>"
    )


def figures(images: Sequence[Image]) -> str:
    """Return figures in a grid that becomes one column on a phone."""
    return f'<div class="figures">{"".join(figure(image) for image in images)}</div>' if images else ""


def paragraph(words: str, style: str = "") -> str:
    """Return a paragraph of HTML."""
    return f'<p class="{style}">{words}</p>' if style else f"<p>{words}</p>"


def missing(what: str, how: str = "") -> str:
    """Return the sentence for a part that the result does not hold; `how` is the flag that records it."""
    hint = f" <code>{escape(how)}</code> records it." if how else ""
    return paragraph(f"{escape(what)}: not recorded.{hint}", "missing")


def command(line: str) -> str:
    """Return the note that names the command behind a figure."""
    return paragraph(f"Given by <code>{escape(line)}</code>", "command") if line else ""


def section(anchor: str, title: str, body: str) -> str:
    """Return a section under a heading of the second level."""
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{body}</section>'


def mark(held: object) -> Html:
    """Return the badge of a claim: sign and word, never colour alone."""
    if held is True:
        return Html('<span class="badge held">✓ Held</span>')
    if held is False:
        return Html('<span class="badge lost">✗ Not held</span>')
    return Html('<span class="badge">? Not recorded</span>')
