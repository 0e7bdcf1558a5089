"""Cut long texts into documents at places that two copies of the same text share."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

LARGEST_PIECE = 65_536
"""Characters of the longest document; a longer text is cut into several."""
SMALLEST_PIECE = 2_048


def piece_size(total_bytes: int) -> int:
    """Return the longest piece for a domain of `total_bytes`: one that gives at least about sixteen pieces."""
    return min(LARGEST_PIECE, max(SMALLEST_PIECE, total_bytes // 16))


def cut(blocks: Iterable[str], longest: int = LARGEST_PIECE) -> Iterator[str]:
    """Yield the documents of a text that arrives in blocks; together they are the text, character for character.

    A text of at most `longest` characters is one document. A longer one is cut between a quarter of `longest` and
    `longest` characters: before the paragraph (else line, else word) whose first characters have the
    smallest checksum, so that a second copy with a changed beginning is cut at the same paragraphs.
    """
    rest, whole = "", True
    for block in blocks:
        rest += block
        while len(rest) > longest:
            whole = False
            place = _place(rest, longest)
            yield rest[:place]
            rest = rest[place:]
    if rest and (whole or rest.strip()):
        yield rest


def _place(text: str, longest: int) -> int:
    first = max(1, longest // 4)
    for mark in ("\n\n", "\n", " "):
        best, best_sum = 0, 1 << 33
        at = text.find(mark, first - len(mark), longest)
        while at >= 0:
            after = at + len(mark)
            if mark == "\n\n" and after < longest and text[after] == "\n":
                at = text.find(mark, at + 1, longest)  # the last newline of a run is the one to cut at
                continue
            checksum = zlib.crc32(text[after : after + 48].encode("utf-8", "replace"))
            if checksum < best_sum and after <= longest:
                best, best_sum = after, checksum
            at = text.find(mark, after, longest)
        if best:
            return best
    return longest
