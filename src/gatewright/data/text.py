"""Cut long texts into documents at places that two copies of the same text share."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Iterator

LARGEST_PIECE = 65_536
"""Characters of the longest document; a longer text is cut into several."""
SMALLEST_PIECE = 2_048

# More would only take time: 64 MB of words on one line hold millions of them.
_CANDIDATES = 512
# Where to cut, best first: before a paragraph at the margin, any paragraph, a line, a word. A run is matched
# once, from its first character, so a million empty lines take linear time; the plain string is a quick test.
_MARKS = (
    ("\n\n", re.compile(r"(?<!\n)\n{2,}+(?=\S)")),
    ("\n\n", re.compile(r"(?<!\n)\n{2,}+")),
    ("\n", re.compile(r"(?<!\n)\n++")),
    (" ", re.compile(r"(?<![ \t])[ \t]++")),
)


def piece_size(total_bytes: int) -> int:
    """Return the longest piece for a domain of `total_bytes`: short enough for about sixteen of them."""
    return min(LARGEST_PIECE, max(SMALLEST_PIECE, total_bytes // 16))


def cut(blocks: Iterable[str], longest: int = LARGEST_PIECE) -> Iterator[str]:
    """Yield the documents of a text that arrives in blocks; together they are the text, to the character.

    A text of at most `longest` characters is one document. A longer one is cut between a quarter of
    `longest` and `longest` characters: before the paragraph (else line, else word) whose first characters
    have the smallest checksum, so that a second copy with a changed beginning is cut at the same paragraphs.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > longest:
            end = _place(rest, start, longest)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _place(text: str, start: int, longest: int) -> int:
    first, last = start + max(1, longest // 4), start + longest
    for literal, mark in _MARKS:
        if text.find(literal, first, last) < 0:
            continue
        best, smallest = 0, 1 << 32
        matches = mark.finditer(text, first, last)
        for match in itertools.islice(matches, _CANDIDATES):
            after = match.end()
            checksum = zlib.crc32(text[after : after + 48].encode("utf-8", "replace"))
            if checksum < smallest:
                best, smallest = after, checksum
        if best:
            return best
    return start + longest
