"""A page as its reader has it: parsed, checked for order, reduced to its words."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "source", "input", "br", "link"}


class Checker(HTMLParser):
    """Collects what the page refers to and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.identities: list[str] = []
        self.words: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        self.scripts += tag == "script"
        self.identities += [given["id"] or ""] if "id" in given else []
        self.references += [given[key] or "" for key in ("src", "href", "srcset") if key in given]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.words.append(data)


def check(html: str) -> Checker:
    """Parse a page and return what it holds."""
    found = Checker()
    found.feed(html)
    assert found.open == []
    return found


def plain(html: str) -> str:
    """Return what a reader sees, with single spaces."""
    return re.sub(r"\s+", " ", " ".join(check(html).words))
