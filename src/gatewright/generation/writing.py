"""One text as it is written: drawn ids become text, up to a stop text, with the route of each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from gatewright.data import Tokenizer
from gatewright.errors import UserError
from gatewright.generation.opened import TextModel
from gatewright.generation.reader import Reader
from gatewright.generation.routing import (
    NOTHING,
    Route,
    route_line,
    routers_of,
    routing_data,
    with_routes,
)
from gatewright.generation.sampling import Sampling
from gatewright.generation.steps import check_tokens, steps
from gatewright.generation.text import StopTexts, TextStream

End = Literal["end", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Writing:
    """How much is written, and what is shown of it."""

    max_new_tokens: int = 400
    """tokens to draw at most; an end of text ends it earlier"""
    stop: tuple[str, ...] = ()
    """texts that end it before them, as soon as one is complete"""
    show_routing: bool = False
    """a line per token: its experts and their weights, layer by layer; the text follows whole"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens {self.max_new_tokens}; allowed: 0 or more")
        StopTexts(self.stop)


class Writer:
    """Iterates over the pieces of one text, each as soon as it is certain; `text`, `ids` and `routed` are
    what there is so far, and `end` says what ended it: an end id ("end"), a stop text ("stop"), or the count
    ("length").

    Args: `prompt` [1, S] is what `reader` goes on from; `ends` are ids that end the text; `turn` counts the
    texts of one conversation, which draw from random numbers of their own.
    """

    def __init__(
        self,
        reader: Reader,
        prompt: Tensor,
        tokenizer: Tokenizer,
        *,
        count: int,
        sampling: Sampling,
        ends: frozenset[int],
        stop: Sequence[str] = (),
        turn: int = 0,
    ) -> None:
        self._reader, self._prompt, self._tokenizer, self._count = reader, prompt, tokenizer, count
        self._stops, self.routing = StopTexts(stop), reader.capture
        self._drawn = steps(reader, prompt, count, sampling, ends, turn)
        self.text = ""
        self.end: End | None = None
        self.ids: list[int] = []
        self.routed: list[tuple[int, Route]] = []

    def __iter__(self) -> Iterator[str]:
        shown = TextStream(self._tokenizer)
        for token, route in self._tokens():
            self.ids.append(token)
            if self.routing:
                self.routed.append((token, route))
            yield self._certain(self._stops.push(shown.push(token)))
            if self._stops.found is not None:
                self.end = "stop"
                return
        last = self._stops.push(shown.flush())
        self.end = "length" if len(self.ids) == self._count else "end"
        self.end = self.end if self._stops.found is None else "stop"
        yield self._certain(last + self._stops.flush())

    def last_line(self) -> str:
        """Return the line of the last token's way."""
        token, route = self.routed[-1]
        return route_line(self._tokenizer.pieces([token])[0], route)

    def _certain(self, piece: str) -> str:
        self.text += piece
        return piece

    def _tokens(self) -> Iterator[tuple[int, Route]]:
        if self.routing:
            return with_routes(self._reader, self._prompt, self._drawn)
        return ((ids[0], {}) for ids in self._drawn if ids[0] is not None)


def show_pieces(
    writer: Writer, show: Callable[[str], object], tell: Callable[[str], object], before: str = ""
) -> None:
    """Write a text and show `before` and each piece; where its routing is kept, tell a line per token, and
    then show the text whole, or as far as it went where it is interrupted.
    """
    if not writer.routing:
        show(before)
        for piece in writer:
            show(piece)
        return
    told = 0
    try:
        for _ in writer:
            if len(writer.routed) > told:
                told = len(writer.routed)
                tell(writer.last_line())
    finally:
        show(before + writer.text)


def continue_text(
    opened: TextModel,
    prompt: str,
    sampling: Sampling,
    writing: Writing,
    *,
    ahead: bool = False,
    show: Callable[[str], object] = str,
    tell: Callable[[str], object] = str,
) -> dict[str, Any]:
    """Return what follows a prompt: {"prompt", "text", "end", "new_tokens", "seconds", "step", "routing"}.

    Args: `show` takes the prompt and then each piece, `tell` a line per token where its routing is shown.
    """
    ids, _ = check_tokens(opened.model, opened.prompt(prompt))
    routed = writing.show_routing and bool(routers_of(opened.model))
    room = ids.shape[1] + writing.max_new_tokens
    reader = Reader(opened.model, 1, room, ahead=ahead, capture=routed)
    if writing.show_routing and not routed:
        tell(NOTHING)
    writer = Writer(
        reader,
        ids,
        opened.tokenizer,
        count=writing.max_new_tokens,
        sampling=sampling,
        ends=opened.ends,
        stop=writing.stop,
    )
    begun = time.monotonic()
    show_pieces(writer, show, tell, prompt)
    pieces = opened.tokenizer.pieces([token for token, _ in writer.routed])
    return {
        "step": opened.step,
        "new_tokens": len(writer.ids),
        "seconds": time.monotonic() - begun,
        "prompt": prompt,
        "text": writer.text,
        "end": writer.end,
        "routing": routing_data(writer.routed, pieces, opened.model) if routed else None,
    }
