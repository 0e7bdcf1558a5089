"""From ids to text as they come: no half character is shown, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gatewright.errors import UserError


class Decodes(Protocol):
    """What TextStream needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, U+FFFD for bytes that are no whole character."""


class TextStream:
    """Turns ids into text as they come, and never shows half a character: bytes wait until theirs is whole.

    `push(id)` returns the text that has become certain ("" while a character is open); `flush()`, at the end,
    what is left, with U+FFFD for a character that stayed open. All pieces together are the text.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before, self._num_before = "", 0

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        # What ends in U+FFFD may still become a character; an end of text adds nothing.
        if text.endswith("\ufffd") or len(text) <= len(self._before):
            return ""
        piece = text[len(self._before) :]
        # This piece's ids stay: some tokenizers write a leading space only if something stands before it.
        self._ids = self._ids[self._num_before :]
        self._num_before, self._before = len(self._ids), self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """Return what is left and begin anew."""
        rest = self._tokenizer.decode(self._ids)[len(self._before) :]
        self._ids, self._before, self._num_before = [], "", 0
        return rest


class StopTexts:
    """Ends a text before the first of some stop texts, however its pieces are cut; nothing of one comes out.

    `push(piece)` returns what is certain to stand before any stop text; what may be the beginning of one
    waits. `found` is the stop text that ended it, None so far; `flush()`, at the end, is what still waited.
    The text ends where the first stop text is complete; of several that end there, the longest counts.
    Raises: UserError for an empty stop text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise UserError("an empty stop text; allowed: one character or more; leave it out for none")
        # The longest first: of those that end together, it begins first.
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._waiting = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take a piece; return the text that is now certain, "" once a stop text was found."""
        if self.found is not None:
            return ""
        text = self._waiting + piece
        ends = [(place + len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            end = min(place for place, _ in ends)
            self.found = next(stop for place, stop in ends if place == end)
            self._waiting = ""
            return text[: end - len(self.found)]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """Return what waited: no stop text came of it."""
        rest, self._waiting = self._waiting, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, less than all of it."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
