"""Texts with a pass key in them: real text, four digits stated somewhere in it, and a question at its end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatewright.experiments.steps import Stream

STATEMENT, QUESTION = b" Key <%s>. ", b" Key <%s"
DIGITS = 4
# An end of text, the statement and the question: what is left of a length is real text.
FIRST = 32  # ids of the longest text with a key at the start of training
LEAST = 1 + len(STATEMENT % b"0000") + len(QUESTION % b"0000")
Ids = NDArray[np.int64]


class Passkey(NamedTuple):
    """A text that ends in the key, and the key's ids [DIGITS]."""

    ids: Ids
    key: Ids


def passkey(text: Ids, length: int, position: float, draw: np.random.Generator, eot: int) -> Passkey:
    """Return `length` ids: an end of text, the start of `text` with the statement behind a share `position`
    of it, and the question with its answer. The key is drawn.

    Raises: ValueError for a length without room.
    """
    if length < LEAST:
        raise ValueError(f"a pass key takes {LEAST} ids; {length} were given")
    key = bytes(draw.choice(list(b"0123456789"), DIGITS, replace=False).tolist())
    filler = text[: length - LEAST]
    before = round(position * len(filler))
    parts = (_ids(STATEMENT % key), filler[before:], _ids(QUESTION % key))
    ids = np.concatenate([np.array([eot]), filler[:before], *parts])
    return Passkey(ids, _ids(key))


def _ids(raw: bytes) -> Ids:
    return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)


def _position(draw: np.random.Generator) -> float:
    """Return a position drawn evenly, one of six times an end: both would hardly come up in long texts."""
    return float(np.clip(draw.uniform(-0.1, 1.1), 0.0, 1.0))


class PasskeyStream:
    """Training batches in which rows of real text hold pass keys: each row is cut into texts, each with its
    own key at a position drawn by `_position`. A pure function of the step, as the stream below it.

    Lengths are drawn evenly on a logarithmic scale from LEAST to a longest that grows over `steps` up to the
    context: from long texts alone a small model does not begin to learn, and from short ones alone it learns
    no longer ones.
    """

    def __init__(self, stream: Stream, steps: int, eot: int) -> None:
        self.stream, self.steps, self.eot = stream, steps, eot

    def longest(self, step: int, context: int) -> int:
        """Return the longest length of a step."""
        return round(FIRST + (context - FIRST) * min(step / max(self.steps, 1), 1.0))

    def batch(self, step: int) -> Ids:
        """Return [rows, context + 1] ids."""
        rows: Ids = self.stream.batch(step).copy()
        draw = np.random.default_rng((step, 1))
        context = rows.shape[1] - 1
        reach = self.longest(step, context) / LEAST
        for row in rows:
            start = 0
            while context - start >= LEAST:
                length = min(round(LEAST * reach ** draw.random()), context - start)
                own = passkey(row[start:].copy(), length, _position(draw), draw, self.eot)
                row[start : start + length] = own.ids
                start += length
        return rows


def problems(
    text: Ids, count: int, length: int, position: float, seed: int, eot: int
) -> tuple[Ids, NDArray[np.int64]]:
    """Return `count` texts [count, length] of other places of `text`, all with the key at one position, and
    their keys [count, DIGITS].
    """
    draw = np.random.default_rng((seed, length, round(100 * position)))
    starts = draw.integers(len(text) - length, size=count)
    made = [passkey(text[start:], length, position, draw, eot) for start in starts]
    return np.stack([own.ids for own in made]), np.stack([own.key for own in made])
