"""What the tests of the documentation need of Markdown: code blocks by heading, and links."""

from __future__ import annotations

import re
from typing import NamedTuple

FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    """One fenced block and the heading above it."""

    heading: str
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks in order."""
    found = []
    for match in FENCE.finditer(text):
        # A "#" inside an earlier block is a comment, not a heading.
        above = FENCE.sub("", text[: match.start()])
        headings = re.findall(r"^#+ (.+)$", above, re.MULTILINE)
        found.append(Block(headings[-1] if headings else "", match["language"], match["code"]))
    return found


def local_links(text: str) -> list[str]:
    """Return the links and pictures that point into the repository, anchors cut off."""
    prose = FENCE.sub("", text)
    targets = [match["target"].partition("#")[0] for match in LINK.finditer(prose)]
    return [
        target for target in targets if target and "://" not in target and not target.startswith("mailto:")
    ]
