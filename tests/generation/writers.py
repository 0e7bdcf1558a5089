"""A decoder that writes what it is told, and a reader of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatewright.backbones import Decoder, DecoderOutput
from gatewright.data import ByteTokenizer, Tokenizer
from gatewright.generation import Reader, Sampling
from gatewright.generation.writing import Writer
from gatewright.parts import MLP, Stats

PROMPT = torch.tensor([[256, 65]])


class Scripted(Decoder):
    """Writes the ids of a script behind a prompt of `before` ids, and ends of text behind that."""

    def __init__(self, script: list[int], before: int = PROMPT.shape[1], context: int = 512) -> None:
        super().__init__(257, 4, 1, [MLP(4, 4)], context=context)
        self.script, self.before = script, before

    def forward(self, tokens: Tensor, cache: Any = None, capture: bool = False, **_: Any) -> DecoderOutput:
        # Nothing is put into the cache, so that every pass is given the whole text.
        place = tokens.shape[1] - self.before
        wanted = self.script[place] if place < len(self.script) else 256
        logits = torch.zeros(*tokens.shape, 257)
        logits[..., wanted] = 50
        return DecoderOutput(logits, Stats())


def writer(text: str | bytes, *, count: int = 100, tokenizer: Tokenizer | None = None, **more: Any) -> Writer:
    """Return the writer of a scripted text, in bytes."""
    raw = text.encode() if isinstance(text, str) else text
    reader = Reader(Scripted(list(raw)), 1, 400)
    options = {"sampling": Sampling(temperature=0), "ends": frozenset({256}), "count": count}
    return Writer(reader, PROMPT, tokenizer or ByteTokenizer(), **options, **more)
